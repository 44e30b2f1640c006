"""Recipes (models/NAME.toml) and calibration manifests (calibration/NAME.toml): data only.

Every field is described, bounded and documented once, here; models/README.md and
calibration/README.md repeat it in tables, checked by a test.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from resq_deploy import encoding
from resq_deploy.errors import InputError

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Probability = Annotated[float, Field(gt=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(_Section):
    """Where the images come from."""

    name: str = Field(
        description="data set: digits, cifar10, cifar100, gtsrb, gtsrb-roi, imagefolder, or the "
        "path of a test .npz"
    )
    root: Path | None = Field(None, description="folder of the data set; else RESQ_DATA")
    train: str | None = Field(
        None,
        pattern=r"\.npz$",
        description="path of an .npz with the training images, instead of the set's own",
    )
    test: str | None = Field(
        None,
        pattern=r"\.npz$",
        description="path of an .npz with the test images, instead of the set's own",
    )
    train_images: Positive | None = Field(
        None, description="train on so many of the training images, a fixed draw, instead of all"
    )
    size: Annotated[int, Field(ge=8, le=1024)] | None = Field(
        None, description="resize to this many pixels per side: gtsrb, gtsrb-roi, imagefolder"
    )
    validation: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="fraction of the training images, whole tracks, that is held out and takes "
        "the place of the test images",
    )
    augment: Literal["none", "crop", "crop-flip"] = Field(
        "none", description="training-time augmentation"
    )
    calibration: str = Field(description="calibration manifest: NAME of calibration/NAME.toml")


class Model(_Section):
    """Which network."""

    net: str | None = Field(
        None,
        description="network: resnet8, resnet20, resnet18, vgg16, mobilenetv2, efficientnet_b0 "
        "or swin_tiny",
    )
    source: str | None = Field(
        None,
        pattern=r"^.+:[A-Za-z_][A-Za-z0-9_]*$",
        description="a network of your own instead: path/to/file.py:factory, relative to the "
        "recipe, or package.module:factory; the stage float executes it",
    )
    arguments: dict[str, bool | int | float | str] | None = Field(
        None, description="keyword arguments of the factory of source"
    )
    mean: tuple[float, ...] | None = Field(
        None, description="with source: mean per channel that the network expects to be subtracted"
    )
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None, description="with source: deviation per channel that it expects to be divided by"
    )
    image_size: Literal[32, 224] = Field(
        32, description="height and width of the images that the network's form is made for"
    )
    width: float = Field(1.0, gt=0, description="multiplier of the numbers of channels")
    weight_bits: Literal[8, 4] = Field(8, description="bits of every weight")
    profile: Literal["float-channel", "po2-tensor", "po2-channel", "asymmetric-tensor"] = Field(
        "float-channel",
        description="scales: any, per output channel; powers of two, per tensor or per output "
        "channel; or any, per tensor, with a zero point (robust quantization)",
    )

    @model_validator(mode="after")
    def _one_network(self) -> Model:
        own = {"arguments", "mean", "std"}
        # a recipe that was read back from a sidecar names every field, those left alone too
        given = {
            name
            for name in ({"image_size", "width"} if self.source else own)
            if getattr(self, name) != type(self).model_fields[name].get_default()
        }
        if (self.net is None) == (self.source is None):
            raise ValueError("give one of net and source")
        if given:
            other = "source" if self.source else "net"
            raise ValueError(f"{', '.join(sorted(given))} has no meaning with {other}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("give mean and std, or neither")
        return self

    def portable_source(self) -> str | None:
        """`source` without the folder, which is this machine's."""
        if self.source is None:
            return None
        file, _, factory = self.source.rpartition(":")
        return f"{Path(file).name}:{factory}"


class Training(_Section):
    """One training stage: SGD with Nesterov momentum, warm-up and cosine decay."""

    epochs: int = Field(ge=0, description="passes over the training images")
    batch: Positive = Field(128, description="images per step")
    lr: float = Field(gt=0, description="peak learning rate")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty on weights, not biases")
    label_smoothing: Fraction = Field(0.0, description="label smoothing of the cross-entropy")
    max_gradient_norm: float = Field(
        1.0, gt=0, description="gradients are scaled down to this L2 norm over all parameters"
    )


class Float(Training):
    """Float pre-training."""

    epochs: int = Field(0, ge=0, description="passes over the training images")
    lr: float = Field(0.1, gt=0, description="peak learning rate")
    checkpoint: Path | None = Field(
        None,
        description="float safetensors, relative to the recipe, that is taken instead of "
        "training; the other fields then say how it was made",
    )


class Baseline(Training):
    """The int8 network that every table compares with; without epochs it is only calibrated."""

    epochs: int = Field(0, ge=0, description="passes over the training images")
    lr: float = Field(0.01, gt=0, description="peak learning rate")
    equalize: int = Field(
        0, ge=0, description="iterations of cross-layer equalization before quantizing"
    )
    bias_correction: bool = Field(
        False, description="after calibrating, restore mean outputs per channel"
    )


class Attack(Training):
    """Stage 1: loss = CE(x) + adversarial_weight CE(x') + feature_weight D(h(x), h(x')).

    That is feature-consistency; for the other methods see docs/methods.md.
    """

    method: Literal["feature-consistency", "trades", "adversarial", "afd"] = Field(
        "feature-consistency", description="how the network is desensitized"
    )
    epsilon: Fraction = Field(description="L-infinity radius of x', pixels in [0, 1]")
    steps: Positive = Field(1, description="PGD steps that make x'")
    step_size: float = Field(1.25, gt=0, description="PGD step, relative to epsilon / sqrt(steps)")
    adversarial_weight: float = Field(1.0, ge=0, description="weight of the loss on x'")
    feature_weight: float = Field(1.0, ge=0, description="weight of the feature term")
    distance: Literal["cosine", "mse"] = Field("cosine", description="feature distance D")
    discriminator_lr: float = Field(1e-3, gt=0, description="learning rate of afd's discriminator")
    graft: Fraction = Field(
        0.0,
        description="share of the channels before ReLUs that are made linear first, those that "
        "matter least (linearity grafting)",
    )

    @model_validator(mode="after")
    def _grafting_needs_the_stage(self) -> Attack:
        if self.graft and not self.epochs:
            raise ValueError(
                f"graft = {self.graft:g} is done at the start of this stage, which has no epochs; "
                "give it some, or leave graft out"
            )
        return self


def _known_encoding(name: str) -> str:
    encoding.parse(name)
    return name


class Fault(Training):
    """Stage 2: faults during training, with clipped weights; the loss of stage 1 stays on."""

    method: Literal["randbet", "advbet", "k-upset", "wcat", "clip"] = Field(
        "randbet", description="how faults enter training"
    )
    rate: Probability = Field(0.01, description="bit error rate during training: randbet")
    flips: Positive = Field(16, description="bits that flip in a step: k-upset, advbet")
    rate_schedule: Literal["constant", "linear"] = Field(
        "constant", description="linear: rate, flips grow from 0 over the first half of the steps"
    )
    fault_weight: float = Field(1.0, ge=0, description="weight of the loss under bit errors")
    start_loss: float = Field(
        1.75, gt=0, description="errors begin once the running clean loss is below this"
    )
    clip_rms: float = Field(
        2.0, ge=0, description="clip weights to this many RMS per channel after every step; 0: not"
    )
    guided: Literal["proportional", "top-k", "none"] = Field(
        "proportional", description="which layers get more bit errors, by criticality"
    )
    top_k: Positive = Field(10, description="layers that get errors when guided = top-k")
    ema_beta: Fraction = Field(0.9, description="decay of the gradient-norm average")
    range_lr: float = Field(0.01, gt=0, description="step of wcat's ranges")
    range_penalty: float = Field(0.1, ge=0, description="what pushes wcat's ranges down")
    range_margin: float = Field(
        0.1, ge=0, description="rise of the clean loss from which on wcat's ranges are not pushed"
    )
    keep_attack: bool = Field(True, description="keep the loss of stage 1")
    encoding: Annotated[str, AfterValidator(_known_encoding)] = Field(
        "plain", description="how the weights are stored, here and in all that follows"
    )

    @model_validator(mode="after")
    def _encoding_needs_the_stage(self) -> Fault:
        if self.encoding != "plain" and not self.epochs:
            raise ValueError(
                f"encoding {self.encoding} begins with this stage, which has no epochs; give it "
                "some, or leave encoding out and store a checkpoint so with export --encoding"
            )
        return self


class Adjust(_Section):
    """Stage 3: clip and rescale the quantized weights on calibration images."""

    granularity: Literal["layer", "channel"] = Field(
        "layer", description="what gets a clip ratio of its own"
    )
    channel_groups: Positive = Field(
        4, description="groups of channels per layer that are decided together: channel"
    )
    activations: bool = Field(
        False, description="also clip the ranges of the activations behind ReLUs"
    )
    ratios: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.9, 0.8, 0.7, 0.6, 0.5), description="clip ratios tried"
    )
    rate: Probability = Field(0.01, description="bit error rate of the fault patterns")
    patterns: Positive = Field(32, description="fixed fault patterns in the objective")
    fault_weight: float = Field(1.0, ge=0, description="weight of the loss under faults")
    margin: Fraction = Field(
        0.01, description="allowed fall of clean and of adversarial accuracy, as a fraction"
    )
    epsilon: Fraction = Field(description="L-infinity radius of the adversarial constraint")
    steps: Positive = Field(5, description="PGD steps of the adversarial constraint")
    bias_correction: bool = Field(True, description="restore mean outputs per channel afterwards")


class Export(_Section):
    """The files."""

    opset: Annotated[int, Field(ge=13, le=20)] = Field(19, description="ONNX opset")
    ir_version: Annotated[int, Field(ge=8, le=13)] = Field(10, description="ONNX IR version")
    parity_images: Positive = Field(1000, description="test images of the parity proof")
    weights: Literal["int8", "int4"] = Field(
        "int8", description="how the QDQ file stores a weight: a code per byte, or two"
    )
    tflite: Literal["where-possible", "required"] = Field(
        "where-possible",
        description="whether a network that TFLite cannot hold is exported without model.tflite",
    )


class Prove(_Section):
    """Campaigns and attacks on the exported files."""

    images: Positive = Field(1000, description="test images of campaigns and attacks (the first)")
    rates: tuple[Probability, ...] = Field(
        (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 2e-2, 5e-2), min_length=1, description="bit error rates"
    )
    draws: Annotated[int, Field(ge=2)] = Field(50, description="fault patterns per rate")
    margin: Probability = Field(0.05, description="margin of the single-flip campaign")
    confidence: Probability = Field(0.95, description="confidence of every interval")
    single_images: Positive = Field(200, description="test images of the single-flip campaign")
    epsilons: tuple[Fraction, ...] = Field(
        (1 / 255, 2 / 255, 4 / 255, 8 / 255), min_length=1, description="L-infinity radii"
    )
    steps: Positive = Field(20, description="PGD steps")
    restarts: Positive = Field(1, description="random starts of PGD")


_NPZ_FIELDS = ("name", "train", "test")
"""Fields of [data] that may be the path of an .npz."""


class Recipe(_Section):
    """One model from data to proof."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run")
    seed: int = Field(1, ge=0, description="root seed of every random stream")
    data: Data
    model: Model
    float: Float
    baseline: Baseline = Baseline()
    attack: Attack = Attack(epochs=0, lr=0.01, epsilon=0)
    fault: Fault = Fault(epochs=0, lr=0.01)
    adjust: Adjust
    export: Export = Export()
    prove: Prove = Prove()

    @model_validator(mode="after")
    def _has_weights(self) -> Recipe:
        given = self.float.checkpoint or "epochs" in self.float.model_fields_set
        if self.model.net and not given:
            raise ValueError("float: give epochs, or a checkpoint")
        return self

    @model_validator(mode="after")
    def _goes_together(self) -> Recipe:
        """A stage would refuse it too, after the training of those before."""
        model, fault = self.model, self.fault
        stored, small = fault.encoding, model.weight_bits == 4
        if small and stored != "plain":
            raise ValueError(
                f"fault.encoding = {stored} is for 8-bit weights, not for model.weight_bits = 4"
            )
        if model.profile == "asymmetric-tensor" and (small or stored != "plain"):
            raise ValueError(
                "model.profile = asymmetric-tensor goes with 8-bit weights and fault.encoding = "
                f"plain, got {model.weight_bits} bits and {stored}"
            )
        if fault.method == "advbet" and encoding.parse(stored).corrects:
            raise ValueError(
                f"fault.method = advbet has no worst bit where fault.encoding = {stored} corrects "
                "each: take randbet"
            )
        for field, given in (
            ("adjust.activations", self.adjust.activations),
            ("attack.graft", self.attack.graft),
        ):
            if given and model.profile != "float-channel":
                raise ValueError(
                    f"{field} needs model.profile = float-channel, not {model.profile}"
                )
        if self.export.weights == "int4" and not small:
            raise ValueError("export.weights = int4 needs model.weight_bits = 4")
        return self

    @property
    def packed(self) -> bool:
        """Are two codes stored in a byte?"""
        return self.export.weights == "int4"

    def portable(self) -> dict[str, Any]:
        """Plain JSON values without the paths of this machine, for artefacts."""
        paths = {"data": {"root", "calibration"}, "float": {"checkpoint"}}
        raw = self.model_dump(mode="json", exclude=paths)
        for field in _NPZ_FIELDS:
            if (raw["data"][field] or "").endswith(".npz"):
                raw["data"][field] = Path(raw["data"][field]).name
        raw["model"]["source"] = self.model.portable_source()
        return raw


class CalibrationManifest(_Section):
    """Which images calibrate: activation scales, stage 3."""

    data: str = Field(description="data set that the images come from; must match the recipe")
    split: Literal["train", "test"] = Field("train", description="split; test only without train")
    images: Positive = Field(description="number of images")
    seed: int = Field(0, ge=0, description="seed of the selection, without replacement")
    sha256: str | None = Field(None, description="expected digest of the selected images")


T = TypeVar("T", bound=_Section)


def _parse(kind: type[T], raw: dict[str, Any], where: str) -> T:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "recipe"
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            parts = first["loc"][:-1]
            section: Any = kind
            for part in parts:
                section = section.model_fields[str(part)].annotation
            known = ", ".join(section.model_fields)
            message = f"unknown field; expected one of {known}"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        given = first["input"]
        shown = "" if isinstance(given, dict) else f", got {given!r}"
        raise InputError(f"{where}: {field}: {message}{shown}{more}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file; InputError in one line when it is missing or broken."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None


def parse(raw: dict[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain values; InputError names the first wrong field."""
    return _parse(Recipe, raw, where)


def files(path: Path) -> list[Path]:
    """The files that a recipe is read from: itself, and the one beside it that it extends."""
    beside = read_toml(path).get("extends")
    if beside is None:
        return [path]
    if not isinstance(beside, str) or Path(beside).name != beside:
        raise InputError(f"{path}: extends: a recipe in the same folder expected, got {beside!r}")
    return [path, path.parent / beside]


def _extended(path: Path) -> dict[str, Any]:
    """The values of a recipe; those that it does not give are of the recipe that it extends.

    All but the name: two recipes of one name would share a folder of results.
    """
    raw, *bases = (read_toml(file) for file in files(path))
    if not bases:
        return raw
    (base,) = bases
    if "extends" in base:
        raise InputError(
            f"{path}: extends: {raw['extends']} extends {base['extends']}; extend that one"
        )
    del raw["extends"]
    base.pop("name", None)
    sections = {
        key: base[key] | given
        for key, given in raw.items()
        if isinstance(given, dict) and isinstance(base.get(key), dict)
    }
    return base | raw | sections


def load(path: Path) -> Recipe:
    """Read and check models/NAME.toml; relative paths in it are taken from its folder.

    With `extends = "OTHER.toml"`, a recipe beside it, every field that it does not give is of that
    one. An .npz of [data] that is not there is left for the data folder (`root`, RESQ_DATA).
    """
    recipe = parse(_extended(path), str(path))
    here = path.resolve().parent
    update: dict[str, Any] = {}
    if recipe.float.checkpoint is not None:
        checkpoint = here / recipe.float.checkpoint
        if not checkpoint.is_file():
            raise InputError(f"{path}: float.checkpoint: no file {checkpoint}")
        update["float"] = recipe.float.model_copy(update={"checkpoint": checkpoint})
    file, _, factory = (recipe.model.source or "").rpartition(":")
    if file.endswith(".py"):
        if not (here / file).is_file():
            raise InputError(f"{path}: model.source: no file {here / file}")
        source = f"{here / file}:{factory}"
        update["model"] = recipe.model.model_copy(update={"source": source})
    calibration = here.parent / "calibration" / f"{recipe.data.calibration}.toml"
    data: dict[str, Any] = {"calibration": str(calibration)}
    if recipe.data.root is not None:
        data["root"] = here / recipe.data.root
    for field in _NPZ_FIELDS:
        given = getattr(recipe.data, field)
        # Else it is looked for in the data folder.
        if given is not None and given.endswith(".npz") and (here / given).exists():
            data[field] = str(here / given)
    update["data"] = recipe.data.model_copy(update=data)
    return recipe.model_copy(update=update)


def load_manifest(path: Path) -> CalibrationManifest:
    """Read and check calibration/NAME.toml."""
    return _parse(CalibrationManifest, read_toml(path), str(path))


TEMPLATE = """\
# A recipe: one model from data to proof. Every field: models/README.md.
name = "my-model"
seed = 1

[data]
name = "cifar10"            # digits | cifar10 | cifar100 | gtsrb | imagefolder | path of an .npz
augment = "crop-flip"       # none | crop | crop-flip
calibration = "cifar10"     # calibration/cifar10.toml

[model]
net = "resnet8"             # resnet20 | resnet18 | vgg16 | ...; or source = "mynet.py:make_net"

[float]                     # float pre-training
epochs = 30
lr = 0.2

[baseline]                  # int8 quantization-aware training: what every table compares with
epochs = 2
lr = 0.01

[attack]                    # stage 1
epochs = 4
lr = 0.02
epsilon = 0.00784313725     # 2/255

[fault]                     # stage 2
epochs = 4
lr = 0.02
rate = 0.01

[adjust]                    # stage 3
epsilon = 0.00784313725
"""
