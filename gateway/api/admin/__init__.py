"""The operator's plane: every route below /admin/v1 that is not about money."""

from litestar import Router

from gateway.api.admin.adapters import (
    change_adapter,
    delete_adapter,
    delete_version,
    get_adapter,
    get_version,
    list_adapters,
    list_versions,
    purge_adapter,
    purge_version,
    restore_adapter,
    restore_version,
)
from gateway.api.admin.aliases import (
    get_alias,
    list_aliases,
    list_moves,
    move_alias,
    remove_alias,
    roll_back_alias,
)
from gateway.api.admin.base_models import (
    create_base_model,
    list_base_models,
    retire_base_model,
    swap_base_model,
)
from gateway.api.admin.budgets import change_budget, create_budget, delete_budget, list_budgets
from gateway.api.admin.files import get_certificate, get_file, list_files
from gateway.api.admin.grants import grant_adapter, list_grants, revoke_grant
from gateway.api.admin.keys import create_key, list_keys, revoke_key, rotate_key
from gateway.api.admin.limits import (
    get_adapter_limits,
    get_key_limits,
    get_tenant_limits,
    set_adapter_limits,
    set_key_limits,
    set_tenant_limits,
)
from gateway.api.admin.policies import delete_policy, get_policy, list_decisions, put_policy
from gateway.api.admin.residency import (
    list_engines,
    pin_version,
    unpin_version,
    warm_version,
)
from gateway.api.admin.tenants import change_tenant, create_tenant, get_tenant, list_tenants
from gateway.api.admin.uploads import (
    complete_upload,
    create_upload,
    create_version,
    delete_upload,
    get_upload,
    put_file,
)
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
        change_tenant,
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
        get_policy,
        put_policy,
        delete_policy,
        list_decisions,
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
        change_adapter,
        delete_adapter,
        restore_adapter,
        purge_adapter,
        list_versions,
        create_version,
        get_version,
        delete_version,
        restore_version,
        purge_version,
        list_files,
        get_file,
        get_certificate,
        list_aliases,
        get_alias,
        list_moves,
        move_alias,
        roll_back_alias,
        remove_alias,
        list_grants,
        grant_adapter,
        revoke_grant,
        create_upload,
        put_file,
        get_upload,
        complete_upload,
        delete_upload,
        list_base_models,
        create_base_model,
        swap_base_model,
        retire_base_model,
        list_engines,
        warm_version,
        pin_version,
        unpin_version,
    ],
)
