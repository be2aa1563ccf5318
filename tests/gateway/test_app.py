"""The application as a whole, as far as it can be looked at without starting it."""

import inspect
import re
from ipaddress import ip_network

import pytest
from litestar import Litestar, get

from gateway.api.document import document_of
from gateway.app import create_app
from gateway.auth import ANY_TENANT, SCOPES, check_routes
from gateway.settings import Settings, SettingsFault


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(
        database_app_url="postgresql+asyncpg://app:secret@localhost/manylora",
        database_worker_url="postgresql+asyncpg://worker:secret@localhost/manylora",
        engine_addresses=("unix:/run/engine.sock", "http://[::1]:9000"),
        engine_secret="the-engines-own",
        peppers={1: bytes(32), 2: b"n" * 32},
        store_url="memory://",
        data_dir=tmp_path,
        host="127.0.0.1",
        port=8000,
        max_upload_bytes=1 << 20,
        purge_after_days=30,
        max_adapters_per_tenant=0,
        max_adapter_bytes_per_tenant=5,
        max_file_bytes_per_tenant=6,
        lora_folder=tmp_path / "adapters",
        trusted_proxies=(ip_network("10.0.0.0/8"),),
        webhook_networks=(ip_network("192.168.1.7/32"),),
        max_retry_credit_nano=10**9,
        supervisor_socket=tmp_path / "supervisor.sock",
        reports_unknown_fields=True,
        tool_call_parser="mistral",
        parent_pid=17,
    )


@pytest.fixture
def app(settings) -> Litestar:
    return create_app(settings)


def test_settings_survive_the_way_through_the_environment(settings):
    assert Settings.from_environment(settings.to_environment()) == settings


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MANYLORA_ENGINE", ""),
        ("MANYLORA_ENGINE", "unix:/run/a,localhost:9000"),
        ("MANYLORA_ENGINE", "unix:/run/a,unix:/run/a"),
        ("MANYLORA_PORT", "eighty"),
        ("MANYLORA_PEPPER", "not hexadecimal"),
        ("MANYLORA_PEPPER", "00"),
        ("MANYLORA_PEPPER", "new:" + "00" * 32),
        ("MANYLORA_TRUSTED_PROXIES", "10.0.0.1/8"),
        ("MANYLORA_UNKNOWN_FIELDS", "ignore"),
        ("MANYLORA_TOOL_CALL_PARSER", "pythonic"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(settings, variable, value):
    with pytest.raises(SettingsFault, match=variable):
        Settings.from_environment({**settings.to_environment(), variable: value})


def test_every_route_of_the_api_is_documented_in_one_sentence(app):
    for path, item in document_of(app)["paths"].items():
        for method, operation in item.items():
            assert re.match(r"[A-Z].{5,80}$", operation["summary"]), (method, path)
            assert operation["tags"], (method, path)


# Of an upload that was declared, and whose completion is recorded; and a wish that leaves no trace.
NOT_RECORDED = {"put_file", "warm_version"}


def test_every_admin_route_that_changes_something_names_its_actor(app):
    """Whoever records an action, the handler or what it hands its caller to, has the actor."""
    for route in app.routes:
        for handler in getattr(route, "route_handlers", []):
            changes = handler.http_methods & {"POST", "PUT", "PATCH", "DELETE"}
            is_recorded = handler.fn.__name__ not in NOT_RECORDED
            if changes and is_recorded and route.path.startswith("/admin"):
                source = inspect.getsource(handler.fn)
                names_actor = "principal.key_id" in source or "principal=principal" in source
                assert names_actor, (route.path, handler.fn.__name__)


def test_no_field_of_a_body_has_the_name_of_a_part(app):
    """Else a wrong value of it would be a 500: the framework tells by names whose fault it is."""
    for route in app.routes:
        for handler in getattr(route, "route_handlers", []):
            body = handler.parsed_fn_signature.parameters.get("data")
            fields = getattr(body and body.annotation, "__struct_fields__", ())
            assert not set(fields) & set(handler.resolve_dependencies()), route.path


def test_a_route_that_names_no_scope_stops_the_start():
    @get("/silent")
    async def silent() -> None: ...

    with pytest.raises(AssertionError, match="/silent"):
        check_routes(Litestar([silent]))


def test_only_health_documents_and_static_files_need_no_key(app):
    public = {
        route.path
        for route in app.routes
        for handler in getattr(route, "route_handlers", [])
        if handler.opt.get("scope") not in SCOPES | {ANY_TENANT}
        and handler.http_methods != {"OPTIONS"}
    }
    assert {path.split("/")[1] for path in public} == {"health", "docs", "static"}
