"""The body of a chat completion: OpenAI's fields, and Lance's own settings beside them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from openlance.config import SolverName

MAX_SEED = 2**63 - 1
MOST = 2**31 - 1  # of any count
MOST_REUSE = 1000


class Strict(BaseModel):
    """Refuses unknown fields by name, and numbers that are none (NaN, infinity)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def _only(*neutral: Any) -> AfterValidator:
    """For a field of OpenAI's that this server cannot honour: what asks for nothing is taken, and no more."""

    def check(value: Any) -> Any:
        if value is not None and value not in neutral:
            raise PydanticCustomError("unsupported", "is not supported by this server: leave it out")
        return value

    return AfterValidator(check)


def _unicode(text: str) -> str:
    """JSON can spell half of a surrogate pair, which no text can hold."""
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise PydanticCustomError("unicode", "holds half of a surrogate pair: send valid Unicode")
    return text


No = Annotated[bool | None, _only(False)]
Zero = Annotated[float | None, _only(0)]
NoList = Annotated[list[Any] | None, _only([])]
NoDict = Annotated[dict[str, Any] | None, _only({})]
Nothing = Annotated[Any, _only()]
NoTool = Annotated[Any, _only("none", "auto")]


Words = Annotated[str, AfterValidator(_unicode)]


class TextPart(Strict):
    type: Literal["text"]
    text: Words


class ImageAddress(Strict):
    """url: data:image/png;base64,…, or an http(s) address of a host that the server fetches from."""

    url: str
    detail: Annotated[str | None, _only("auto")] = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageAddress


class VideoAddress(Strict):
    """url: data:video/mp4;base64,…, or an http(s) address of a host that the server fetches from."""

    url: str


class VideoPart(Strict):
    type: Literal["video_url"]
    video_url: VideoAddress


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Content = Annotated[list[Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[Part])]


class ChatMessage(Strict):
    """One turn. images: of an assistant's, as this server gave them, to be looked at again."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None
    images: list[ImagePart] | None = None
    name: Nothing = None
    refusal: Nothing = None
    audio: Nothing = None
    function_call: Nothing = None
    tool_calls: NoList = None
    annotations: NoList = None

    @model_validator(mode="after")
    def _complete(self) -> ChatMessage:
        if self.images and self.role != "assistant":
            raise PydanticCustomError("images", "images are the assistant's: give image_url parts in content")
        if not self.content and not self.images:
            raise PydanticCustomError("content", "the message is empty: give content")
        media = any(not isinstance(part, TextPart) for part in self.content or ())
        if media and self.role in ("system", "developer"):
            raise PydanticCustomError("content", "a system message holds words only")
        return self

    @property
    def parts(self) -> list[TextPart | ImagePart | VideoPart]:
        return [*(self.images or ()), *(self.content or ())]


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: No = None


class TextFormat(Strict):
    """Words without a schema are all there is."""

    type: Annotated[str, _only("text")]


class OpenAIFields(Strict):
    """Fields of OpenAI's that are taken where they ask for nothing that is lacking here."""

    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    store: No = None
    service_tier: Annotated[str | None, _only("auto", "default")] = None
    logprobs: No = None
    top_logprobs: Zero = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: NoDict = None
    response_format: TextFormat | None = None
    tools: NoList = None
    tool_choice: NoTool = None
    parallel_tool_calls: bool | None = None
    functions: NoList = None
    function_call: NoTool = None
    reasoning_effort: Annotated[str | None, _only("none")] = None
    verbosity: Nothing = None
    prediction: Nothing = None
    audio: Nothing = None
    web_search_options: Nothing = None


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


Stop = Annotated[
    list[Annotated[Words, Field(max_length=256)]],
    Field(max_length=16),
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
]


class WordSettings(Strict):
    """How words are drawn. What is not given is the model's own: temperature 0, the likeliest word."""

    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0, le=MOST)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=100)] = None
    lookup: Annotated[int | None, Field(ge=0, le=64)] = None


class PictureSettings(Strict):
    """How pictures are denoised. What is not given is the model's own."""

    steps: Annotated[int | None, Field(ge=1, le=MOST)] = None
    solver: SolverName | None = None
    shift: Annotated[float | None, Field(gt=0, le=1000)] = None
    guidance: Annotated[float | None, Field(ge=-1000, le=1000)] = None
    guidance_interval: tuple[float, float] | None = None
    renorm: Literal["global", "channel", "none"] | None = None
    renorm_min: Annotated[float | None, Field(ge=0, le=1)] = None
    visual_guidance: Annotated[float | None, Field(ge=-1000, le=1000)] = None
    reuse: Annotated[float | None, Field(ge=0, le=MOST_REUSE)] = None
    reuse_order: Annotated[int | None, Field(ge=0, le=1)] = None
    negative_prompt: Words | None = None
    size: Annotated[str | None, Field(pattern=r"^([0-9]{1,5}x[0-9]{1,5}|auto)$")] = None
    """WIDTHxHEIGHT in pixels, as OpenAI writes it; of an edit, the picture that is edited decides."""


class ChatRequest(OpenAIFields, WordSettings, PictureSettings):
    """A conversation to be answered in words or, with `modalities` ["text", "image"], with a picture."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    modalities: list[Literal["text", "image"]] | None = None
    n: Annotated[int | None, Field(ge=1, le=MOST)] = None
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED)] = None
    max_tokens: Annotated[int | None, Field(ge=1, le=MOST)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=MOST)] = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def draws(self) -> bool:
        """Whether a picture is wanted."""
        return "image" in (self.modalities or ())

    def given(self, group: type[Strict]) -> dict[str, Any]:
        """The fields of one group that were given."""
        return {name: value for name in group.model_fields if (value := getattr(self, name)) is not None}
