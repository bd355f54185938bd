"""What a run is (RunConfig, from run.toml) and how a daemon runs here (PeerConfig, CoordinatorConfig).

Settings of the algorithm carry the names that TRL and transformers give them.
"""

import json
from abc import ABC
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from platformdirs import user_config_path
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from hivegrpo.protocol.errors import MismatchError
from hivegrpo.protocol.strict import explain, read_toml


class Section(BaseModel):
    """One table of run.toml: immutable, unknown keys are errors, every field is described."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class RunSection(Section):
    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w][\w .+-]*$")
    """What people call this run."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seeds the order of the prompts, the adapter of version 0, and the sampling."""
    versions: int = Field(ge=1)
    """Policy versions to train."""
    start_peers: int = Field(default=1, ge=1, le=4096)
    """Peers that must be there before version 0 is agreed and work starts."""


class ModelSection(Section):
    path: Path | None = None
    """Folder of a local base model (config, tokenizer, safetensors); travels to the peers."""
    name: str | None = Field(default=None, min_length=1)
    """Base model on the Hugging Face hub; each peer downloads it."""
    revision: str | None = Field(default=None, min_length=1)
    """Commit, tag or branch of the hub model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the frozen base; the adapter is always float32."""
    attn_implementation: Literal["eager", "sdpa"] = "sdpa"
    """Attention backend, the same on every peer."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        _exactly_one(self.path, self.name)
        if (self.name is None) != (self.revision is None):
            raise ValueError("a hub name needs a revision, so that every peer has the same base; a path takes none")
        return self


class Rows(Section):
    """Where rows come from: a local file, or a dataset on the hub."""

    path: Path | None = None
    """Local .jsonl or .parquet file; travels to the peers."""
    name: str | None = Field(default=None, min_length=1)
    """Dataset on the Hugging Face hub."""
    config: str | None = None
    """Configuration of the hub dataset, for example "main"."""
    split: str | None = None
    """Split of the hub dataset; "train" for training and "test" for evaluation if left out."""
    revision: str | None = None
    """Commit, tag or branch of the hub dataset."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        _exactly_one(self.path, self.name)
        if self.path is not None and (self.config or self.split or self.revision):
            raise ValueError("config, split and revision belong to a hub dataset; a path takes none of them")
        if self.path is not None and self.path.suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"{self.path.name} must be a .jsonl or .parquet file")
        return self


class DatasetSection(Rows):
    prompt_column: str = "prompt"
    """Column that holds the prompt, a string."""
    answer_column: str = "answer"
    """Column that holds what the rewards compare with."""
    system_prompt: str | None = None
    """System message, for a tokenizer with a chat template."""
    prompt_template: str | None = None
    """Plain text around the prompt, with "{prompt}" once; takes the place of a chat template."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.prompt_template is not None and self.prompt_template.count("{prompt}") != 1:
            raise ValueError('prompt_template must contain "{prompt}" exactly once')
        if self.prompt_template is not None and self.system_prompt is not None:
            raise ValueError("system_prompt is for chat templates: write it into prompt_template instead")
        return self


class EvaluationSection(Rows):
    every: int = Field(default=10, ge=1)
    """Measure greedy accuracy at every so many versions (and at the first and the last)."""
    limit: int = Field(default=500, ge=1)
    """Rows to measure on, from the top."""


class RewardsSection(Section):
    functions: tuple[Annotated[str, Field(min_length=1, max_length=48)], ...] = Field(min_length=1, max_length=8)
    """Names of reward functions that every peer has installed."""
    weights: tuple[float, ...] | None = None
    """One weight a function; all 1 if left out."""

    @model_validator(mode="after")
    def _weight_each(self) -> Self:
        if len(set(self.functions)) != len(self.functions):
            raise ValueError("a reward function is named twice")
        if self.weights is not None and len(self.weights) != len(self.functions):
            raise ValueError(f"{len(self.weights)} weights for {len(self.functions)} functions")
        return self


class GrpoSection(Section):
    num_generations: int = Field(default=8, ge=2, le=1024)
    """Completions of one prompt: the group G."""
    prompts_per_round: int = Field(default=32, ge=1, le=1 << 20)
    """Groups that make one policy version, over all peers."""
    max_prompt_length: int = Field(default=512, ge=1)
    """Tokens; longer prompts are dropped and counted."""
    max_completion_length: int = Field(default=512, ge=1)
    """Tokens; longer completions are cut."""
    temperature: float = Field(default=1.0, gt=0.0, le=100.0)
    """Of the sampling, and of the log-probabilities in the loss."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample from the smallest set of tokens with this much probability; 1 is off."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many most probable tokens; 0 is off."""
    beta: float = Field(default=0.0, ge=0.0)
    """Weight of the KL divergence to the reference; 0 loads no reference."""
    epsilon: float = Field(default=0.2, gt=0.0, lt=1.0)
    """The probability ratio is clipped at 1 - epsilon ..."""
    epsilon_high: float = Field(default_factory=lambda values: values["epsilon"], gt=0.0)
    """... and at 1 + epsilon_high; the same as epsilon if left out."""
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """How token losses add up: per token, per sequence, or per sequence of constant length."""
    scale_rewards: Literal["group", "none"] = "group"
    """Whether advantages are divided by the group's standard deviation."""


class LoraSection(Section):
    r: int = Field(default=16, ge=1, le=1024)
    """Rank of the adapter."""
    alpha: float = Field(default=32.0, gt=0.0)
    """The adapter's output is scaled by alpha / r."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Modules that get an adapter."""


class OptimizerSection(Section):
    learning_rate: float = Field(default=1e-5, gt=0.0, le=1.0)
    """Peak learning rate of AdamW; ten times TRL's default for GRPO, as suits an adapter."""
    adam_beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay of the first moment."""
    adam_beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    """Decay of the second moment."""
    adam_epsilon: float = Field(default=1e-8, ge=1e-30, le=1.0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0)
    """Decoupled weight decay."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate over the versions, after the warm-up: constant, or falling to 0."""
    warmup_steps: int = Field(default=0, ge=0)
    """Versions over which the learning rate rises from 0."""


class AveragingSection(Section):
    codec: Literal["mxint8", "fp32"] = "mxint8"
    """How gradients are encoded on the wire."""
    rule: Literal["mean"] = "mean"
    """How contributions are combined: the mean by weight."""


class TimingSection(Section):
    lease: float = Field(default=120.0, ge=1.0, le=86_400.0)
    """Seconds that a peer may work on a lease before it is leased again."""
    exchange: float = Field(default=30.0, ge=0.5, le=3_600.0)
    """Seconds for sending a round's gradients."""
    step: float = Field(default=60.0, ge=0.5, le=3_600.0)
    """Seconds from the seal to the peers' state roots."""
    grace: float = Field(default=5.0, ge=0.0, le=3_600.0)
    """Seconds that a disconnected peer keeps its place."""
    max_attempts: int = Field(default=5, ge=1, le=100)
    """Attempts at one version before its contributions are given up."""


class AdmissionSection(Section):
    mode: Literal["open", "allow_list"] = "open"
    """Who may join: anybody, or the peers listed."""
    peers: tuple[str, ...] = ()
    """Peer ids of the allow-list."""

    @model_validator(mode="after")
    def _list_or_open(self) -> Self:
        if (self.mode == "allow_list") != bool(self.peers):
            raise ValueError('mode "allow_list" needs peers, and mode "open" takes none')
        return self


class DistributionSection(Section):
    anchor_every: int = Field(default=10, ge=1)
    """Every so many versions the whole state is archived; updates lead from there to the newest."""
    keep_versions: int = Field(default=20, ge=1)
    """Versions whose updates are kept."""

    @model_validator(mode="after")
    def _reach_an_anchor(self) -> Self:
        if self.keep_versions < self.anchor_every:
            raise ValueError("keep_versions must reach back to an anchor: at least anchor_every")
        return self


class RunConfig(Section):
    """Everything that defines a run; what is left out of run.toml has the default given here."""

    run: RunSection
    """The run itself."""
    model: ModelSection
    """The frozen base."""
    dataset: DatasetSection
    """The prompts."""
    evaluation: EvaluationSection | None = None
    """Held-out rows, if accuracy is to be measured."""
    rewards: RewardsSection
    """What is rewarded."""
    grpo: GrpoSection = GrpoSection()
    """The algorithm."""
    lora: LoraSection = LoraSection()
    """What is trained."""
    optimizer: OptimizerSection = OptimizerSection()
    """The canonical step."""
    averaging: AveragingSection = AveragingSection()
    """The exchange."""
    timing: TimingSection = TimingSection()
    """Durations."""
    admission: AdmissionSection = AdmissionSection()
    """Who may join."""
    distribution: DistributionSection = DistributionSection()
    """How states are kept."""

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Self:
        if self.optimizer.warmup_steps >= self.run.versions:
            raise ValueError("[optimizer] warmup_steps must be below [run] versions")
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read run.toml. Local paths in it are relative to its folder. ConfigError if anything is wrong with it."""
        tables = read_toml(path)
        for section in ("model", "dataset", "evaluation"):
            table = tables.get(section)
            if isinstance(table, dict) and isinstance(table.get("path"), str):
                table["path"] = str((path.parent / Path(table["path"]).expanduser()).resolve())
        try:
            return cls.model_validate(tables)
        except ValidationError as error:
            raise explain(error, cls, str(path)) from None

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The config in a run's manifest; MismatchError if this version of hivegrpo does not know it all."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            complaint = explain(error, cls, "The run's configuration")
            raise MismatchError(complaint.message, "Install the version of hivegrpo that the run uses.") from None

    def canonical_json(self) -> str:
        """Sorted keys, no spaces, defaults filled in: equal configs have equal bytes."""
        values = self.model_dump(mode="json")
        return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    def published(self) -> Self:
        """As it goes to others: a local path keeps only its last name, so that nobody learns this machine's folders."""
        sections: dict[str, Section] = {}
        for name, section in (("model", self.model), ("dataset", self.dataset), ("evaluation", self.evaluation)):
            if section is not None and section.path is not None:
                sections[name] = section.model_copy(update={"path": Path(section.path.name)})
        return self.model_copy(update=sections)


class DaemonConfig(BaseSettings, ABC):
    """Settings of one daemon on one machine: flag, then environment, then TOML, then default."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    role: ClassVar[str]
    """Names the TOML file in the configuration folder."""

    home: Path | None = None
    """This daemon's own folder; runs/<run id>/<role> under the state folder if left out."""
    host: str = "0.0.0.0"  # noqa: S104 - peers come from anywhere
    """Address to listen on."""
    port: int = Field(default=0, ge=0, le=65_535)
    """Port to listen on; 0 takes a free one, and keeps it in the home folder."""
    dht: bool = True
    """Whether to find others through the DHT."""

    @classmethod
    def load(cls, **flags: Any) -> Self:
        """Settings with those flags that are not None on top; ConfigError names what is wrong."""
        try:
            return cls(**{name: value for name, value in flags.items() if value is not None})
        except ValidationError as error:
            raise explain(error, cls, f"The {cls.role}'s settings") from None

    @classmethod
    def toml_path(cls) -> Path:
        """Where the daemon's TOML file is, if there is one."""
        return user_config_path("hivegrpo") / f"{cls.role}.toml"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only these three, highest first."""
        path = cls.toml_path()
        if not path.exists():
            return init_settings, env_settings
        read_toml(path)  # says in our words what is wrong with it
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, path)


class PeerConfig(DaemonConfig):
    """`hivegrpo peer`; environment HIVEGRPO_PEER_*."""

    model_config = SettingsConfigDict(env_prefix="HIVEGRPO_PEER_")
    role: ClassVar[str] = "peer"

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to sample and to take gradients; auto takes a GPU if there is one."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """Threads of torch; cores / peers on this machine if left out."""
    micro_batch_tokens: int = Field(default=4096, ge=1)
    """Tokens, padding included, in one forward and backward pass: less memory, or more speed."""
    sampling_tokens: int = Field(default=65_536, ge=1)
    """Tokens, prompts included, that are sampled side by side."""


class CoordinatorConfig(DaemonConfig):
    """`hivegrpo coordinator`; environment HIVEGRPO_COORDINATOR_*."""

    model_config = SettingsConfigDict(env_prefix="HIVEGRPO_COORDINATOR_")
    role: ClassVar[str] = "coordinator"

    exit_when_finished: bool = False
    """Stop when the last version is committed, instead of serving it."""


def _exactly_one(path: Path | None, name: str | None) -> None:
    if (path is None) == (name is None):
        raise ValueError("give exactly one of path and name")
