"""Who asks: decided before any route is looked for, so that no route can be forgotten.

It goes by the path that the router will go by, ``scope["path"]``; ``request.url`` is made of what the client says its
host is. (CVE-2026-48710)
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from tokenrelay.service.api.access.keyring import Keyring
from tokenrelay.service.errors import Forbidden, ServiceError, Unauthorized
from tokenrelay.service.tenants import DEFAULT_TENANT, Tenant

HEALTH = frozenset({"/livez", "/readyz", "/health"})  # whoever restarts or balances servers has no key
METRICS = "/metrics"
OPERATORS = {  # only for them, and why
    METRICS: "/metrics tells of all tenants",
    "/v1/load_lora_adapter": "Adapters are for all tenants",
    "/v1/unload_lora_adapter": "Adapters are for all tenants",
}


class AuthenticationMiddleware:
    """Leaves the Tenant in ``request.state.tenant``, or answers 401 or 403 itself."""

    def __init__(self, app: ASGIApp, keyring: Keyring, metrics_need_key: bool) -> None:
        self._app = app
        self._keyring = keyring
        self._public = HEALTH if metrics_need_key else HEALTH | {METRICS}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope.setdefault("state", {})["tenant"] = self._tenant(scope)
        except ServiceError as error:
            refuse = scope["app"].exception_handlers[ServiceError]  # it knows the error's shape on this route
            await (await refuse(Request(scope), error))(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _tenant(self, scope: Scope) -> Tenant:
        if scope["path"] in self._public:
            return DEFAULT_TENANT
        secrets = _secrets(Headers(scope=scope))
        tenant = self._keyring.owner(secrets)
        if not tenant:
            raise Unauthorized(_WRONG if secrets else _MISSING)
        if scope["path"] in OPERATORS and not tenant.is_operator:
            raise Forbidden(f"{OPERATORS[scope['path']]}, so it needs an operator's key.")
        return tenant


_MISSING = "An API key is required; send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'."
_WRONG = "The API key is not valid; ask the operator of this server for one."


def _secrets(headers: Headers) -> list[str]:
    """OpenAI's clients send the one, Anthropic's the other; some send both, one of them made up."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    given = (bearer.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "").strip())
    return [secret for secret in given if secret]
