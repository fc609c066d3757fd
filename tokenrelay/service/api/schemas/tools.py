"""Tools that a model may call, which of them it should, and calls it made: OpenAI's fields."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from tokenrelay.service.api.schemas.request_schema import RequestSchema

MAX_TOOLS = 128
MAX_CALLS = 128  # in one message
MAX_ID_CHARACTERS = 256

ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Schema = dict[str, Any]


class FunctionDefinition(RequestSchema):
    name: ToolName
    description: str | None = Field(None, description="What it is for: the model reads it.")
    parameters: Schema | None = Field(None, description="JSON schema of its arguments. Default: there are none.")
    strict: bool | None = Field(None, description="Has no effect: forced calls always keep the schema.")


class FunctionTool(RequestSchema):
    type: Literal["function"]
    function: FunctionDefinition

    @property
    def size(self) -> int:
        """Characters, about."""
        return 64 + len(str(self.function.parameters or "")) + len(self.function.description or "")


class FunctionName(RequestSchema):
    name: ToolName


class NamedTool(RequestSchema):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(RequestSchema):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedToolsChoice(RequestSchema):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice


class MadeCallFunction(RequestSchema):
    name: Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARACTERS)]
    arguments: str = Field(description="JSON, as the model wrote it.")


class MadeCall(RequestSchema):
    """A call in an earlier message of the assistant."""

    id: Annotated[str, Field(max_length=MAX_ID_CHARACTERS)] = ""
    type: Literal["function"] = "function"
    function: MadeCallFunction

    @property
    def arguments(self) -> Any:
        """As templates want them: an object, unless the model wrote something else."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            return self.function.arguments
        return arguments if isinstance(arguments, dict) else self.function.arguments


class ToolFields(BaseModel):
    """What a chat says about tools."""

    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = Field(
        None, description="Functions that the model may call."
    )
    tool_choice: ToolChoice | None = Field(
        None,
        description="Whether it may (auto), must (required, a name) or must not. Default auto, if there are tools.",
    )
    parallel_tool_calls: bool | None = Field(None, description="Whether it may make several calls. Default true.")

    @model_validator(mode="after")
    def _tools_are_there(self) -> ToolFields:
        known = {tool.function.name for tool in self.tools or ()}
        if len(known) < len(self.tools or ()):
            raise PydanticCustomError("same_name", "has two functions of the same name", {"name": "tools"})
        if (self.must_call and not known) or not known.issuperset(self._chosen):
            raise PydanticCustomError("no_such_tool", "asks for a tool that is not in tools", {"name": "tool_choice"})
        return self

    @property
    def must_call(self) -> bool:
        choice = self.tool_choice
        if isinstance(choice, AllowedToolsChoice):
            return choice.allowed_tools.mode == "required"
        return choice == "required" or isinstance(choice, NamedTool)

    @property
    def callable_tools(self) -> list[FunctionTool]:
        """Those that the model is told of."""
        if self.tool_choice == "none":
            return []
        allowed = isinstance(self.tool_choice, AllowedToolsChoice)
        return [tool for tool in self.tools or () if not allowed or tool.function.name in self._chosen]

    @property
    def forced_tools(self) -> list[FunctionTool]:
        """Those of which one must be called; none, if none must."""
        named = isinstance(self.tool_choice, NamedTool)
        tools = self.callable_tools if self.must_call else []
        return [tool for tool in tools if not named or tool.function.name in self._chosen]

    @property
    def _chosen(self) -> set[str]:
        """By name."""
        if isinstance(self.tool_choice, NamedTool):
            return {self.tool_choice.function.name}
        if isinstance(self.tool_choice, AllowedToolsChoice):
            return {tool.function.name for tool in self.tool_choice.allowed_tools.tools}
        return set()
