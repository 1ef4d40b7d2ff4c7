"""What the JSON of every route shares: strict models, fields refused by name, and how tokens are chosen.

Requests are pydantic models, checked strictly (no "1" for 1); null means the default. Fields nobody knows are accepted,
as clients add some of their own; fields that SGLang or OpenAI know and baleen does not do are refused unless their
value asks for nothing. docs/http_api.md has the table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from baleen.chat.detokenizer import compile_stop_regex
from baleen.config import ConfigError
from baleen.messages import Grammar, SamplingParams
from baleen.server.errors import ApiError, bad_request, validation_error
from baleen.server.generation import SequenceSpec

MAX_LOGPROBS = 20
MAX_CHOICES = 128
_GREEDY_BELOW = 1e-6  # a smaller temperature is greedy, as in SGLang

Probability = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
NumTokens = Annotated[int, Field(ge=0, lt=2**31)]

# Of every route: name -> the values that ask for nothing; null is always one of them.
REFUSED: dict[str, tuple[Any, ...]] = {
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "custom_logit_processor": ("",),
    "custom_params": ({},),
    "data_parallel_rank": (0,),
    "disagg_prefill_dp_rank": (0,),
    "extra_key": ("",),
    "lora_path": ("",),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "routed_dp_rank": (0,),
    "routed_experts_start_len": (0,),
    "session_id": ("",),
    "session_params": ({},),
}


class RequestModel(BaseModel):
    """A JSON object of a request. `refused` names known fields that are not done."""

    model_config = ConfigDict(extra="allow", strict=True)
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def check(self, prefix: str = "") -> None:
        """What no single field's type can say. Raises ApiError 400 naming the field as `prefix` + its name."""
        for name, value in (self.model_extra or {}).items():
            nothing = self.refused.get(name)
            if nothing is not None and value is not None and not any(_same(value, other) for other in nothing):
                raise bad_request(prefix + name, "not supported by this server", "unsupported_parameter")


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and value == other  # 0 is not False


M = TypeVar("M", bound=RequestModel)


def parse(model: type[M], body: bytes) -> M:
    """Raises ApiError 400 naming the field."""
    try:
        request = model.model_validate_json(body)
    except ValidationError as error:
        raise validation_error(error) from None
    request.check()
    return request


def parse_part(model: type[M], value: Any, prefix: str) -> M:
    """A JSON object inside a body, already decoded. Raises ApiError 400 naming the field as `prefix` + its name."""
    try:
        part = model.model_validate(value)
    except ValidationError as error:
        raise validation_error(error, prefix) from None
    part.check(prefix)
    return part


class SamplingFields(RequestModel):
    """How to choose tokens, and where the text ends."""

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Probability | None = None
    top_k: int | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=2, allow_inf_nan=False)] | None = None  # logits / it: finite
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = None
    stop: list[str] | None = None
    stop_regex: list[str] | None = None
    no_stop_trim: bool | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None  # no effect: a byte-level decoder puts none

    @field_validator("stop", "stop_regex", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop", "stop_regex")
    @classmethod
    def _stop_is_not_empty(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and "" in value:
            raise ValueError("a stop string must not be empty")
        return value

    @field_validator("stop_regex")
    @classmethod
    def _stop_regex_compiles(cls, value: list[str] | None) -> list[str] | None:
        for source in value or ():
            compile_stop_regex(source)
        return value

    @field_validator("top_k")
    @classmethod
    def _top_k_range(cls, value: int | None) -> int | None:
        if value is not None and value != -1 and not 1 <= value < 2**31:
            raise ValueError("must be at least 1, or -1 for all tokens")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _keys_are_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or ():
            if not (key.isascii() and key.isdigit() and len(key) < 10 and str(int(key)) == key):
                raise ValueError(f"the keys are token ids, as in {{'42': -100}}; {key!r} is none")
        return value

    @property
    def biased_ids(self) -> list[int]:
        return [int(key) for key in self.logit_bias or ()]

    def sampling(
        self,
        defaults: Mapping[str, Any],
        *,
        max_new_tokens: int,
        min_new_tokens: int | None,
        seed: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        grammar: Grammar | None = None,
        banned_ids: frozenset[int] = frozenset(),
    ) -> SamplingParams:
        """All values decided: the request's, else `defaults`, else what changes nothing.

        banned_ids   tokens that must not be chosen, besides what `logit_bias` says
        """

        def value(name: str, neutral: float) -> Any:
            given = getattr(self, name)
            return defaults.get(name, neutral) if given is None else given

        temperature = float(value("temperature", 1.0))
        bias = {int(key): bias for key, bias in (self.logit_bias or {}).items()} | dict.fromkeys(banned_ids, -100.0)
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens or 0,
            temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
            top_p=float(value("top_p", 1.0)),
            top_k=int(value("top_k", -1)),
            min_p=float(value("min_p", 0.0)),
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            repetition_penalty=float(value("repetition_penalty", 1.0)),
            logit_bias=tuple(sorted(bias.items())),
            grammar=grammar,
            seed=seed,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def sequence(
        self,
        input_ids: list[int],
        sampling: SamplingParams,
        *,
        shown: frozenset[int] = frozenset(),
        reasoning_end: int | None = None,
        constraint: str | None = None,
    ) -> SequenceSpec:
        """One sequence; the arguments are SequenceSpec's."""
        return SequenceSpec(
            input_ids,
            sampling,
            self.skip_special_tokens is not False,
            shown=shown,
            stop_regex=tuple(self.stop_regex or ()),
            no_stop_trim=bool(self.no_stop_trim),
            reasoning_end=reasoning_end,
            constraint=constraint,
        )


def read_sampling_defaults(folder: str) -> dict[str, Any]:
    """What generation_config.json says of sampling. Raises ConfigError if the file is there and broken."""
    path = Path(folder) / "generation_config.json"
    if not path.is_file():
        return {}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        values = {name: raw[name] for name in names if raw.get(name) is not None}
        if raw.get("do_sample") is False:
            values.setdefault("temperature", 0.0)
        if values.get("top_k") == 0:
            del values["top_k"]  # transformers' way to say all tokens
        parse_part(SamplingFields, values, "")
    except (OSError, ValueError, AttributeError, RecursionError, ApiError) as error:
        raise ConfigError(str(path), f"cannot be read ({error})", "fetch it again or delete it") from error
    return values
