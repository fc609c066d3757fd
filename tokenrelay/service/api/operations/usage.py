"""GET /v1/usage."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query

from tokenrelay.service.api.dependencies import Api, TenantDep
from tokenrelay.service.api.openapi.operation import ERRORS
from tokenrelay.service.api.schemas.tenant_usage import DayUsage, TenantUsage, UsageCounts
from tokenrelay.service.keys import USAGE_TTL
from tokenrelay.service.usage import DAY_SECONDS

router = APIRouter(tags=["usage"], responses=ERRORS)

MAX_DAYS = USAGE_TTL // DAY_SECONDS - 1


@router.get("/v1/usage")
async def get_usage(
    api: Api,
    tenant: TenantDep,
    days: Annotated[int, Query(ge=0, le=MAX_DAYS, description="So many last days one by one, today first.")] = 7,
) -> TenantUsage:
    """What your requests used, counted when they end: altogether, and by day (UTC)."""
    total = await api.usage.total(tenant.name)
    by_day = await api.usage.by_day(tenant.name, days) if days else {}
    return TenantUsage(
        tenant=tenant.name,
        total=UsageCounts(**total._asdict()),
        days=[DayUsage(date=_date(day), **used._asdict()) for day, used in by_day.items()],
    )


def _date(day: int) -> str:
    return datetime.fromtimestamp(day, UTC).date().isoformat()
