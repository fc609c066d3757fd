"""What Ollama's clients send. Options that this server does not build are refused by name."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tokenrelay.model.sampling_params import MAX_LOGPROBS, MAX_SEED
from tokenrelay.service.api.schemas.chat import MAX_MESSAGES
from tokenrelay.service.api.schemas.not_built import Neutral
from tokenrelay.service.api.schemas.request import MAX_STOP_STRINGS, StopString
from tokenrelay.service.api.schemas.request_schema import RequestSchema
from tokenrelay.service.api.schemas.sampling import (
    AdditivePenalty,
    Mirostat,
    MirostatTau,
    PositiveProbability,
    Probability,
    RepetitionPenalty,
    Temperature,
    TopK,
)
from tokenrelay.service.api.schemas.tools import MAX_CALLS, MAX_TOOLS


class OllamaOptions(RequestSchema):
    not_built: ClassVar[Neutral] = {
        "num_keep": (0,),
        "repeat_last_n": (-1,),
        "penalize_newline": (True,),
        "tfs_z": (1, 1.0),
        "numa": (False,),
        "num_batch": (),
        "num_gpu": (),
        "num_thread": (),
        "main_gpu": (),
        "low_vram": (False,),
        "f16_kv": (True,),
        "logits_all": (False,),
        "vocab_only": (False,),
        "use_mmap": (),
        "use_mlock": (False,),
        "embedding_only": (False,),
    }

    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: PositiveProbability | None = None
    min_p: Probability | None = None
    typical_p: PositiveProbability | None = None
    seed: int | None = Field(None, ge=-1, le=MAX_SEED, description="-1: random.")
    num_predict: int | None = Field(None, ge=-2, description="Most tokens to generate; below 0: as many as fit.")
    num_ctx: int | None = Field(None, ge=1, description="May not be above what is served.")
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = None
    repeat_penalty: RepetitionPenalty | None = Field(None, description="Over all tokens, as with repeat_last_n -1.")
    presence_penalty: AdditivePenalty | None = None
    frequency_penalty: AdditivePenalty | None = None
    mirostat: Mirostat | None = None
    mirostat_tau: MirostatTau | None = None
    mirostat_eta: Probability | None = None


class _Generation(RequestSchema):
    model: str = Field(description='The served model\'s name, with or without ":latest".')
    stream: bool | None = Field(None, description="Lines of JSON while it is generated. Default true.")
    format: Literal["", "json"] | dict[str, Any] | None = Field(None, description='"json", or a JSON schema.')
    options: OllamaOptions | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    keep_alive: float | str | None = Field(None, description="Has no effect: the model stays loaded.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class CalledFunctionParam(RequestSchema):
    index: int | None = None
    name: Annotated[str, Field(min_length=1)]
    arguments: dict[str, Any]


class CallParam(RequestSchema):
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunctionParam


class OllamaMessageParam(RequestSchema):
    not_built: ClassVar[Neutral] = {"images": ([],)}

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    tool_calls: Annotated[list[CallParam], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_name: str | None = Field(None, description="Whose result a tool message is.")
    tool_call_id: str | None = None


class OllamaChatRequest(_Generation):
    messages: Annotated[list[OllamaMessageParam], Field(max_length=MAX_MESSAGES, fail_fast=True)] = Field(
        [], description="None at all: asks only whether the model is loaded."
    )
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None


class OllamaGenerateRequest(_Generation):
    not_built: ClassVar[Neutral] = {
        "template": ("",),
        "suffix": ("",),
        "context": ([],),
        "images": ([],),
        "width": (),
        "height": (),
        "steps": (),
    }

    prompt: str = Field("", description="Nothing: asks only whether the model is loaded.")
    system: str | None = None
    raw: bool | None = Field(None, description="The prompt is what the model reads, without its chat template.")


class ShowRequest(RequestSchema):
    model: str
    verbose: bool | None = Field(None, description="Has no effect: all there is is told.")
