"""What clients may name as model: the network itself, or one of its adapters."""

from __future__ import annotations

from tokenrelay.service.adapters import AdapterDirectory
from tokenrelay.service.api.schemas.models import ModelCard
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.errors import NotFoundError
from tokenrelay.service.messages import Adapter


class Catalogue:
    """Asks the broker only for names that are not the network's own. Raises BrokerUnavailable when it is."""

    def __init__(self, model: ServedModel, adapters: AdapterDirectory) -> None:
        self._model = model
        self._adapters = adapters

    async def adapter(self, name: str) -> Adapter | None:
        """The one of this name; None: the network itself is meant. Raises NotFoundError."""
        adapter = None if name == self._model.name else await self._adapters.find(name)
        if adapter is None and name != self._model.name:
            raise NotFoundError(
                f"The model '{name[:100]}' is not served here; this server has '{self._model.name}'.",
                param="model",
                code="model_not_found",
            )
        return adapter

    async def cards(self) -> list[ModelCard]:
        return [self._model.card, *map(self.card_of, await self._adapters.all())]

    async def card(self, name: str) -> ModelCard:
        """Raises NotFoundError."""
        adapter = await self.adapter(name)
        return self.card_of(adapter) if adapter else self._model.card

    def card_of(self, adapter: Adapter) -> ModelCard:
        return ModelCard(
            id=adapter.name,
            created=adapter.created,
            max_model_len=self._model.max_model_len,
            parent=self._model.name,
        )
