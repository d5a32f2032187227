"""The body of a chat completion -> a question and how it is to be answered.

Fields that are not known, or that ask for what no model here does, are refused by name; nothing is left out in silence.
Clients send many fields with values that change nothing (null, or those in UNCHANGED), which are let pass.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from jaxmllm import json_text
from jaxmllm.data.sources.record import Blob
from jaxmllm.data.templates import IMAGE
from jaxmllm.errors import suggest
from jaxmllm.eval.answer import Question
from jaxmllm.eval.sampling import Sampling
from jaxmllm.serve.limits import Limits, Refused

# Field -> the values with which it changes nothing; None: any value, since it says nothing about the reply.
UNCHANGED: dict[str, tuple | None] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": None,
    "user": None,
    "safety_identifier": None,
    "prompt_cache_key": None,
}
# Of a message, as a client sends back what it got.
UNCHANGED_IN_MESSAGE: dict[str, tuple | None] = {
    "refusal": (),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
    "annotations": ([],),
}
PLAIN = {  # kind of an error of pydantic -> words for it that name none of its classes
    "model_type": "it should be an object",
    "model_attributes_type": "it should be an object with the type text or image_url",
    "union_tag_invalid": "the type of a part is text or image_url",
    "union_tag_not_found": "it should be an object with the type text or image_url",
    "too_short": "it should not be empty",
}
MOST_STOPS, LONGEST_STOP = 16, 256


class Strict(BaseModel):
    """Values must have the type as they are; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Strict):
    """Text."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """A picture. `detail` says how OpenAI's models shall look at it; a model here has one way only."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


Parts = list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[Parts, Tag("parts")],
    Discriminator(lambda value: "parts" if isinstance(value, list) else "text"),
]


class Message(Strict):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class StreamOptions(Strict):
    """How a reply is streamed. include_obfuscation pads events against eavesdroppers; there is no padding here."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ChatRequest(Strict):
    """The body of a request. top_k and repetition_penalty are not OpenAI's (its client sends them as extra_body)."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=2**31)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    seed: int | None = None
    stop: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[str], Tag("texts")],
        Discriminator(lambda value: "texts" if isinstance(value, list) else "text"),
    ] = []
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


def parse(content: bytes, limits: Limits) -> ChatRequest:
    """The request in a body. Raises Refused, which names the field."""
    if sum(map(content.count, (b",", b"[", b"{"))) > limits.marks:
        raise Refused(400, f"the body has more than {limits.marks} commas and brackets")
    try:
        body = json_text.loads(content, max_bytes=limits.body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON that can be read: {error}") from None
    if not isinstance(body, dict):
        raise Refused(400, f"the body must be a JSON object, not a {type(body).__name__}")
    body = changing(body, UNCHANGED)
    if isinstance(messages := body.get("messages"), list):
        body["messages"] = [
            changing(message, UNCHANGED_IN_MESSAGE, f"messages.{i}.") if isinstance(message, dict) else message
            for i, message in enumerate(messages)
        ]
    try:
        return ChatRequest.model_validate(body)
    except ValidationError as error:
        raise refusal(error, body) from None


def changing(fields: dict[str, Any], unchanged: dict[str, tuple | None], place: str = "") -> dict[str, Any]:
    """The fields without those that change nothing. Raises Refused for one that asks for what is not offered."""
    kept = {}
    for name, value in fields.items():
        allowed = unchanged.get(name, ())
        if value is None or allowed is None or any(type(value) is type(x) and value == x for x in allowed):
            continue
        if name in unchanged and not (type(value) is float and value in allowed):
            raise Refused(400, f"{place}{name} is not supported; leave it out", place + name, "unsupported_parameter")
        if name not in unchanged:
            kept[name] = value
    return kept


def refusal(error: ValidationError, body: dict[str, Any]) -> Refused:
    """The first thing that is wrong with a body."""
    found = error.errors(include_url=False, include_context=False)[0]
    kind, place, node, before = found["type"], [], body, None
    for key in found["loc"]:  # which names the kinds of unions too
        of_union = isinstance(before, int) and isinstance(node, dict) and key == node.get("type")
        inside = isinstance(node, dict) and key in node or isinstance(node, list) and isinstance(key, int)
        if inside and not of_union:
            node = node[key]
        if inside and not of_union or kind in ("missing", "extra_forbidden") and key is found["loc"][-1]:
            place.append(str(key))
        before = key
    param = ".".join(place)
    if kind == "extra_forbidden":
        known = [*ChatRequest.model_fields, *UNCHANGED] if len(place) == 1 else []
        return Refused(400, f"there is no field {param}{suggest(param, known)}", param, "unknown_parameter")
    if kind == "missing":
        return Refused(400, f"{param} is missing", param, "missing_required_parameter")
    text = PLAIN.get(kind) or found["msg"].replace("Input should", "it should")
    return Refused(400, f"{param}: {text}", param)


def samplings(request: ChatRequest, limits: Limits, most: int) -> list[Sampling]:
    """How each of the n choices is sampled. most: the longest reply of this server. Raises Refused."""
    name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    asked = getattr(request, name)
    if request.max_tokens and request.max_tokens != asked:
        raise Refused(400, "max_tokens and max_completion_tokens differ; one of them is enough", "max_tokens")
    if asked and asked > most:
        mend = f"ask for fewer, or start the server with --max-new-tokens {asked}"
        raise Refused(400, f"{name} is {asked}, but replies of this server have at most {most} tokens; {mend}", name)
    if request.n > limits.rows:
        raise Refused(400, f"n is {request.n}, but this server makes at most {limits.rows} choices (--batch)", "n")
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    if len(stop) > MOST_STOPS or any(not 1 <= len(text) <= LONGEST_STOP for text in stop):
        raise Refused(400, f"there may be {MOST_STOPS} stop texts, each of 1 to {LONGEST_STOP} characters", "stop")
    seed = secrets.randbits(32) if request.seed is None else request.seed
    fields = "temperature", "top_p", "top_k", "repetition_penalty"
    chosen = {field: getattr(request, field) for field in fields}
    seeds = [(seed + choice) % 2**32 for choice in range(request.n)]
    return [Sampling(**chosen, seed=each, max_new_tokens=asked, stop=stop) for each in seeds]


def question(messages: list[Message], limits: Limits, read: Callable[[str, str], Blob]) -> Question:
    """The question that the last message asks, with its pictures, after what was said before.

    read(url, place) gives the bytes of a picture. Raises Refused.
    """
    first = next((i for i, message in enumerate(messages) if message.role in ("user", "assistant")), len(messages))
    pictures = [url for i, message in enumerate(messages) for url in urls(message, f"messages.{i}.content")]
    if len(pictures) > limits.pictures:
        raise Refused(413, f"there are {len(pictures)} pictures; the limit is {limits.pictures}", "messages")
    texts = [text_of(message, f"messages.{i}") for i, message in enumerate(messages)]
    if (total := sum(map(len, texts))) > limits.characters:
        raise Refused(413, f"the texts have {total} characters; the limit is {limits.characters}", "messages")
    turns = messages[first:]
    for i, message in enumerate(turns):
        if message.role in ("system", "developer"):
            raise Refused(400, "system texts must stand before the first question", f"messages.{first + i}.role")
        if message.role != ("user", "assistant")[i % 2]:
            raise Refused(400, "questions and answers must alternate, a question first", f"messages.{first + i}.role")
    if not len(turns) % 2:
        raise Refused(400, "the last message must be a question, of the role user", "messages")
    *said, prompt = texts[first:]
    blobs = tuple(read(url, place) for url, place in pictures)
    history = tuple(zip(said[::2], said[1::2]))
    system = "\n\n".join(filter(None, texts[:first])) or None
    return Question(prompt, blobs, history, "messages", system=system, markers_are_text=True)


def urls(message: Message, place: str) -> list[tuple[str, str]]:
    """The (URL, place in the request) of each picture of a message."""
    parts = message.content if isinstance(message.content, list) else []
    return [(x.image_url.url, f"{place}.{j}.image_url.url") for j, x in enumerate(parts) if isinstance(x, ImagePart)]


def text_of(message: Message, place: str) -> str:
    """The text of a message, with the marker <image> where each picture stands: where the parts say, unless the text
    itself has as many markers as there are pictures. Raises Refused."""
    parts = [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    pictures, markers = len(parts) - len(texts), sum(text.count(IMAGE) for text in texts)
    if pictures and message.role != "user":
        raise Refused(400, f"a message of the role {message.role} can have no pictures", f"{place}.content")
    if message.role == "assistant":
        return "".join(texts)
    if not markers:
        return "\n".join(part.text if isinstance(part, TextPart) else IMAGE for part in parts)
    if markers != pictures:
        raise Refused(400, f"its text has {IMAGE} {markers} times, but it has {pictures} pictures", f"{place}.content")
    return "\n".join(texts)
