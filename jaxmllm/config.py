"""The vocabulary of a recipe: frozen dataclasses that a config file fills in; recipes.py reads and stores them.

A recipe is a Python file with a function `config() -> Run`; every other function of the file is a variant
(`configs/toy.py:name`). The parts of the model are Flax modules, which are dataclasses too, so the config *is* the
model.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn

from jaxmllm.errors import ConfigError, check_local, suggest
from jaxmllm.fields import Natural, NonNegative, Positive, has, problem
from jaxmllm.mesh import Mesh
from jaxmllm.nn.lora import LoRA
from jaxmllm.train.loggers import JsonLines, TensorBoard

OPEN = {"open": True}  # metadata of a dict field to which overrides may add keys


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set: LLaVA JSON(L), a folder of ArrayRecord shards, or TFDS_FOLDER:SPLIT."""

    path: str
    _: dataclasses.KW_ONLY
    image_root: str | None = None  # default: the folder of `path`
    outside_root: bool = False  # whether records may name files outside image_root, also through links
    weight: float = 1.0  # share in the mixture

    def __post_init__(self):
        check_local("source", self.path)
        check_local("image_root", self.image_root)
        if not 0 < self.weight < math.inf:
            raise ConfigError(f"the weight of {self.path} is {self.weight}; it must be positive and finite")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """How records become rows. A stage may replace any of these fields (Stage.data)."""

    tokenizer: str  # Hugging Face tokenizer folder
    added_tokens: tuple[str, ...] = ()  # special tokens that it lacks; they get the next ids
    template: Any = dataclasses.field(metadata=has("of"))  # data.templates.ChatTemplate, OwnTemplate
    seq_len: Positive  # S, tokens of a row
    image_slots: Natural  # I, images of a row
    targets: Any = dataclasses.field(default=None, metadata=has("spec"))  # data.targets: where targets come from
    shards: Positive | None = None  # virtual shards; None: the largest power of two <= 256 that divides a stage's rows
    packing: bool = True
    max_bad: Natural = 1000  # stop when more samples than this are unusable
    tiling: Any = dataclasses.field(default=None, metadata=has("choose"))  # data.tiling.Tiling: show tiles too
    fast_jpeg: bool = False  # decode large JPEGs at a fraction of their size: faster, but pixels differ slightly

    def __post_init__(self):
        check_local("tokenizer", self.tokenizer)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How parameters are trained whose path matches the regex. The first matching rule counts; each path needs one."""

    pattern: str
    _: dataclasses.KW_ONLY
    lr: NonNegative | None = 1.0  # factor of the learning rate; None: frozen
    decay: bool | None = None  # whether weight decay applies; None: to all but norm scales and biases


@dataclasses.dataclass(frozen=True, kw_only=True)
class Init:
    """Where the weights of each part come from, before the first stage. A part that is not named starts at random.

    A source is a Hugging Face folder, hf:org/name@revision, run:WORKDIR[/stage[/step]], or "random". A part that no
    stage trains must have a source: random weights are frozen only if "random" is written for it.
    """

    llm: str | None = None
    encoders: dict[str, str] = dataclasses.field(default_factory=dict, metadata=OPEN)
    fusers: dict[str, str] = dataclasses.field(default_factory=dict, metadata=OPEN)
    aggregator: str | None = None
    objectives: dict[str, str] = dataclasses.field(default_factory=dict, metadata=OPEN)
    rest: str | None = None  # all parts that are not named

    def __post_init__(self):
        for part, source in self.sources().items():
            check_local(f"init.{part}", source)

    def sources(self) -> dict[str, str]:
        """Part -> source, e.g. {"llm": .., "encoders.clip": ..}, for the parts that are named; also "rest"."""
        found = {name: getattr(self, name) for name in ("llm", "aggregator", "rest")}
        for group in ("encoders", "fusers", "objectives"):
            found |= {f"{group}.{name}": source for name, source in getattr(self, group).items()}
        return {part: source for part, source in found.items() if source is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """A task that measures the model while a stage trains, and at its end."""

    task: Any  # eval.tasks: CVBench, HeldOutLoss, ..
    every: int | None = None  # steps; None: only at the end

    def __post_init__(self):
        if not callable(getattr(self.task, "prepare", None)) or not isinstance(getattr(self.task, "name", None), str):
            raise ConfigError(f"{self.task!r} is no task; it needs a name and prepare(), as in jaxmllm.eval.tasks")
        if self.every is not None and self.every < 1:
            raise ConfigError(f"eval {self.name}: every={self.every}, but it must be 1 step or more")

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One training stage; it starts from the parameters of the previous stage."""

    name: str
    sources: tuple[Source, ...]
    rows: int  # B, rows of the global batch
    steps: int | None = None  # of the optimizer; or else `epochs`, which become steps when the run starts
    epochs: float | None = None  # one epoch: as many trained samples as the sources have records together
    rules: tuple[Rule, ...]
    losses: dict[str, float]  # objective, or auxiliary loss of the blocks -> weight; others are not computed
    optim: Any = dataclasses.field(metadata=has("direction"))  # train.optimizers: AdamW, ..
    accumulate: int = 1  # micro-batches per step
    ema: float | None = None  # decay per step of a moving average of the trained parameters, which evaluation then uses
    data: dict[str, Any] = dataclasses.field(default_factory=dict, metadata=OPEN)  # fields of Run.data that differ
    evals: tuple[Eval, ...] = ()

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(f"stage {self.name}: give either steps or epochs, and None for the other")
        for name in ("rows", "accumulate", "steps", "epochs"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"stages.{self.name}: {name} is {value}, but must be positive")
        if self.rows % self.accumulate:
            raise ConfigError(f"stages.{self.name}: rows {self.rows} do not divide by accumulate {self.accumulate}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"stages.{self.name}: ema {self.ema} is no decay between 0 and 1; 0.999 is usual")
        known = [field.name for field in dataclasses.fields(Data)]
        for name in self.data:
            if name not in known:
                raise ConfigError(f"stages.{self.name}.data has no {name!r}{suggest(name, known)}")
        names = [each.name for each in self.evals]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"stages.{self.name}.evals: two tasks have the name {name!r}; give one another name")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A whole experiment."""

    name: str
    model: nn.Module  # mllm.MLLM
    data: Data
    stages: tuple[Stage, ...]
    init: Init = Init()
    lora: tuple[LoRA, ...] | None = None  # adapters; the rules of a stage say whether it trains them
    mesh: Mesh = Mesh()
    compute_dtype: str = "bfloat16"  # masters are float32
    seed: int = 0
    log_every: Positive = 20  # steps
    save_every: Positive = 500  # steps
    keep: Positive = 2  # checkpoints per stage
    loggers: tuple[Any, ...] = dataclasses.field(  # train.loggers: where metrics are written
        default=(JsonLines(), TensorBoard()), metadata=has("open")
    )

    def __post_init__(self):
        for stage in self.stages:
            for name in stage.losses:
                if name not in self.model.loss_names:
                    known = suggest(name, self.model.loss_names)
                    raise ConfigError(f"stages.{stage.name}.losses: the model has no objective {name!r}{known}")
            for name, value in stage.data.items():
                usual = getattr(self.data, name)
                if isinstance(usual, (int, str)) and value is not None and type(usual) is not type(value):
                    kind = f"expected {type(usual).__name__}, as in {usual!r}, not {value!r}"
                    raise ConfigError(f"stages.{stage.name}.data.{name}: {kind}")
            if wrong := problem(Data, stage.data):
                raise ConfigError(f"stages.{stage.name}.data: {wrong}")
        for part in self.init.sources():
            if part not in (*self.parts(), "rest"):
                raise ConfigError(f"init.{part}: the model has no such part{suggest(part, self.parts())}")

    def parts(self) -> list[str]:
        """The parts of the model that can have a source of weights, e.g. "llm", "encoders.clip"."""
        groups = ("encoders", "fusers", "objectives")
        named = [f"{group}.{name}" for group in groups for name in getattr(self.model, group)]
        return ["llm", *named, *(["aggregator"] if self.model.aggregator else [])]

    def stage(self, name: str) -> Stage:
        """The stage of this name. Raises ConfigError if there is none."""
        stages = {stage.name: stage for stage in self.stages}
        if name not in stages:
            raise ConfigError(f"{self.name} has no stage {name!r}{suggest(name, stages)}")
        return stages[name]

    def data_of(self, stage: Stage) -> Data:
        """How records become rows in a stage."""
        return dataclasses.replace(self.data, **stage.data)


def part_of(path: str) -> str:
    """The part that a parameter belongs to: "encoders_clip/blocks/.." -> "encoders.clip"."""
    if path.startswith("llm/visual/"):  # the visual layers inside the language model are no part of its folder
        return "inserts"
    head = path.split("/")[0]
    kind, _, name = head.partition("_")
    return f"{kind}.{name}" if kind in ("encoders", "fusers", "objectives") else head
