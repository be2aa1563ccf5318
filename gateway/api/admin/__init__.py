"""The operator's plane: every route below /admin/v1 that is not about money."""

from litestar import Router

from gateway.api.admin.adapters import (
    create_version,
    delete_adapter,
    get_adapter,
    list_adapters,
    list_versions,
)
from gateway.api.admin.base_models import list_base_models
from gateway.api.admin.budgets import change_budget, create_budget, delete_budget, list_budgets
from gateway.api.admin.keys import create_key, list_keys, revoke_key, rotate_key
from gateway.api.admin.limits import (
    get_adapter_limits,
    get_key_limits,
    get_tenant_limits,
    set_adapter_limits,
    set_key_limits,
    set_tenant_limits,
)
from gateway.api.admin.tenants import create_tenant, get_tenant, list_tenants, set_status
from gateway.api.admin.webhooks import (
    create_webhook,
    delete_webhook,
    list_deliveries,
    list_webhooks,
)

admin_router = Router(
    "/admin/v1",
    route_handlers=[
        create_tenant,
        list_tenants,
        get_tenant,
        set_status,
        create_key,
        list_keys,
        revoke_key,
        rotate_key,
        get_tenant_limits,
        set_tenant_limits,
        get_key_limits,
        set_key_limits,
        get_adapter_limits,
        set_adapter_limits,
        list_budgets,
        create_budget,
        change_budget,
        delete_budget,
        create_webhook,
        list_webhooks,
        delete_webhook,
        list_deliveries,
        list_adapters,
        get_adapter,
        delete_adapter,
        list_versions,
        create_version,
        list_base_models,
    ],
)
