"""The operator's plane: every route below /admin/v1 that is not about money."""

from litestar import Router

from gateway.api.admin import adapters, base_models, keys, tenants

admin_router = Router(
    "/admin/v1",
    route_handlers=[
        tenants.create_tenant,
        tenants.list_tenants,
        tenants.get_tenant,
        tenants.set_status,
        keys.create_key,
        keys.list_keys,
        keys.revoke_key,
        adapters.list_adapters,
        adapters.get_adapter,
        adapters.delete_adapter,
        adapters.list_versions,
        adapters.create_version,
        base_models.list_base_models,
    ],
)
