"""What routes ask for, by name. Coroutines all, or FastAPI would call each in a thread of its own."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from tokenrelay.service.api.admission.admission import Admission
from tokenrelay.service.api.catalogue import Catalogue
from tokenrelay.service.api.operations.readiness import Readiness
from tokenrelay.service.api.process import ApiProcess
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.tenants import Tenant


async def _api(request: Request) -> ApiProcess:
    api: ApiProcess = request.app.state.api
    return api


Api = Annotated[ApiProcess, Depends(_api)]


async def _tenant(request: Request) -> Tenant:
    tenant: Tenant = request.state.tenant
    return tenant


TenantDep = Annotated[Tenant, Depends(_tenant)]  # who asks


async def _admission(api: Api, tenant: TenantDep) -> Admission:
    return api.admission.of(tenant)


async def _model(api: Api) -> ServedModel:
    return api.model


async def _catalogue(api: Api) -> Catalogue:
    return api.catalogue


async def _readiness(api: Api) -> Readiness:
    return api.readiness


async def _relay_id(request: Request) -> str:
    relay_id: str = request.state.relay_id
    return relay_id


AdmissionDep = Annotated[Admission, Depends(_admission)]  # of who asks
CatalogueDep = Annotated[Catalogue, Depends(_catalogue)]
Model = Annotated[ServedModel, Depends(_model)]
ReadinessDep = Annotated[Readiness, Depends(_readiness)]
RelayId = Annotated[str, Depends(_relay_id)]  # what the broker calls this HTTP request's work
