"""Writes the host methods of TALD's paper on CIFAR-100, with and without TALD, and the pairs of configs/README.md.

    python configs/make_hosts.py          # write every file
    python configs/make_hosts.py --check  # change nothing; fail if a file is not what would be written

Each file is complete, as those of ``configs/make.py``. The teacher/student pair is the block ``pair`` near its top, and
the rest of the file refers to that by aliases; a file has the entries that it uses, the README all of them. Here are
the networks, with the modules that methods read; the entries of a pair; and a :class:`Method` each.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

import torch
import yaml
from torchdistill.models.registry import get_model

import torchdistill_adv  # noqa: F401  (registers its models)

ROOT = Path(__file__).resolve().parent
MARK = "# Written by configs/make_hosts.py: change it there.\n"
README_MARK = "<!-- Written by configs/make_hosts.py: change it there. -->\n"
FOLDER = "cifar100"


# networks


@dataclass(frozen=True)
class Network:
    """A network of RepDistiller, and the modules that methods read.

    Args:
        slug: name in files.
        label: name in text.
        key: of the YAML.
        options: of the YAML.
        maps: the stages whose maps are compared.
        block: kind of HSAKD's heads.
        num_blocks: blocks of the stages, for HSAKD's heads.
        before_relu: of each stage, the module with the map before the last ReLU, and whether that is its input.
        signs: of each stage, a module whose output has the sign of that map; None are ``maps``.
        head_maps: the stages that HSAKD's heads start from; None are ``maps``.
        pool: its output is the vector before the last layer.
        linear: the last layer.
        head_channels: of HSAKD's last convolution, where there is one.
        after_maps: what has parameters between the last map and the last layer.
    """

    slug: str
    label: str
    key: str
    options: str
    maps: tuple[str, ...]
    block: str
    num_blocks: tuple[int, ...]
    before_relu: tuple[tuple[str, str], ...]
    signs: tuple[str, ...] | None = None
    head_maps: tuple[str, ...] | None = None
    pool: str = "avgpool"
    linear: str = "fc"
    head_channels: int | None = None
    after_maps: tuple[str, ...] = ()

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Channels and side length of the output of every module, for images of 32 x 32."""
        model = get_model(self.key, **yaml.safe_load(f"{{{self.options}}}")).eval()
        shapes: dict[str, tuple[int, ...]] = {}
        for name, module in model.named_modules():
            module.register_forward_hook(lambda _, inputs, output, name=name: shapes.update({name: output.shape[1:3]}))
        with torch.no_grad():
            model(torch.zeros(1, 3, 32, 32))
        return shapes

    def size(self, path: str) -> tuple[int, int]:
        channels, side = self.shapes[path]
        return channels, side

    @property
    def width(self) -> int:
        """Length of the vector before the last layer."""
        return self.shapes[self.pool][0]


def stages(count: int, name: str = "layer") -> tuple[str, ...]:
    return tuple(f"{name}{i + 1}" for i in range(count))


def resnet(depth: int) -> Network:
    blocks = (depth - 2) // 6
    last = tuple((f"layer{i}.{blocks - 1}.relu", "input") for i in (1, 2, 3))
    options = "num_classes: 100, pretrained: False"
    return Network(
        f"resnet{depth}", f"ResNet-{depth}", f"resnet{depth}", options, stages(3), "basic", (blocks,) * 3, last
    )


def resnet_x4(depth: int) -> Network:
    blocks = (depth - 2) // 6
    last = tuple((f"layer{i}.{blocks - 1}.relu", "input") for i in (1, 2, 3))
    key = f"cifar_resnet{depth}x4"
    return Network(
        f"resnet{depth}x4", f"ResNet-{depth}x4", key, "num_classes: 100", stages(3), "basic", (blocks,) * 3, last
    )


def wide_resnet(depth: int, factor: int) -> Network:
    # a stage ends in a sum; the BN after it is the first of the next stage
    normalised = ("block2.layer.0.bn1", "block3.layer.0.bn1", "bn1")
    return Network(
        f"wrn_{depth}_{factor}",
        f"WRN-{depth}-{factor}",
        "cifar_wide_resnet",
        f"depth: {depth}, widen_factor: {factor}, num_classes: 100",
        stages(3, "block"),
        "preactivation",
        ((depth - 4) // 6,) * 3,
        tuple((path, "output") for path in normalised),
        signs=normalised,
    )


def vgg(depth: int, maps: Sequence[int], first: int, num_blocks: tuple[int, ...]) -> Network:
    paths = tuple(f"features.{i}" for i in maps)
    return Network(
        f"vgg{depth}",
        f"VGG-{depth}",
        f"cifar_vgg{depth}",
        "num_classes: 100",
        paths,
        "conv",
        num_blocks,
        tuple((path, "input") for path in paths),
        head_maps=(f"features.{first}", paths[0], paths[1], paths[3]),
        linear="classifier",
    )


RESNET20, RESNET32, RESNET56, RESNET110 = map(resnet, (20, 32, 56, 110))
RESNET8X4, RESNET32X4 = map(resnet_x4, (8, 32))
WRN16_2, WRN40_1, WRN40_2 = wide_resnet(16, 2), wide_resnet(40, 1), wide_resnet(40, 2)
VGG8, VGG13 = vgg(8, (6, 10, 14, 17), 2, (1, 1, 1, 2)), vgg(13, (12, 19, 26, 32), 5, (2, 2, 2, 4))
RESNET50 = Network(
    "resnet50",
    "ResNet-50",
    "cifar_resnet50",
    "num_classes: 100",
    stages(4),
    "bottleneck",
    (3, 4, 6, 3),
    tuple((f"layer{i}.{blocks - 1}.relu", "input") for i, blocks in enumerate((3, 4, 6, 3), 1)),
)
MOBILENET_MAPS = ("features.3", "features.6", "features.13", "features.17")
MOBILENET = Network(
    "mobilenetv2",
    "MobileNetV2",
    "cifar_mobilenet_v2_half",
    "num_classes: 100",
    MOBILENET_MAPS,
    "inverted",
    (2, 3, 3, 1),
    tuple((path, "output") for path in MOBILENET_MAPS),
    pool="classifier.0",
    linear="classifier.1",
    head_channels=1280,
    after_maps=("features.18",),
)
SHUFFLENET1 = Network(
    "shufflenetv1",
    "ShuffleNetV1",
    "cifar_shufflenet_v1",
    "num_classes: 100",
    stages(3),
    "shuffle_v1",
    (4, 8, 4),
    tuple((f"layer{i}.{blocks - 1}.relu", "input") for i, blocks in enumerate((4, 8, 4), 1)),
)
SHUFFLENET2_MAPS = ("stage2", "stage3", "stage4")
SHUFFLENET2 = Network(
    "shufflenetv2",
    "ShuffleNetV2",
    "cifar_shufflenet_v2",
    "num_classes: 100",
    SHUFFLENET2_MAPS,
    "shuffle_v2",
    (4, 8, 4),
    # no single module has its map before the ReLU, which only half of the channels pass
    tuple((path, "output") for path in SHUFFLENET2_MAPS),
    head_channels=1024,
    after_maps=("conv5",),
)
PAIRS = (
    (WRN40_2, WRN16_2),
    (WRN40_2, WRN40_1),
    (RESNET56, RESNET20),
    (RESNET110, RESNET20),
    (RESNET110, RESNET32),
    (RESNET32X4, RESNET8X4),
    (VGG13, VGG8),
    (VGG13, MOBILENET),
    (RESNET50, MOBILENET),
    (RESNET50, VGG8),
    (RESNET32X4, SHUFFLENET1),
    (RESNET32X4, SHUFFLENET2),
    (WRN40_2, SHUFFLENET1),
)
DEFAULT = (RESNET56, RESNET20)
SAME_STYLE = PAIRS[:7]
# the paper's supplement and RepDistiller
SLOW = (MOBILENET, SHUFFLENET1, SHUFFLENET2)


# a pair


def output(path: str) -> str:
    return f"{{path: '{path}', io: 'output'}}"


def names(paths: Sequence[str]) -> str:
    """A list of names, on several lines if it is long."""
    text = str(list(paths))
    if len(text) < 80:
        return text
    return "\n" + textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="     ")


def mapping(lines: Mapping[str, str]) -> str:
    """Entries of a block, each with its value, which begins on the same line or on the next."""
    return "".join(f"\n  {name}:{' ' if value[:1].strip() else ''}{value}" for name, value in lines.items())


def hook_lists(inputs: Sequence[str], outputs: Sequence[str]) -> str:
    return mapping({"input": names(inputs), "output": names(outputs)})


def compared(teacher: Sequence[str], student: Sequence[str], weights: Sequence[float] | None = None) -> str:
    """What torchdistill calls pairs: a module of each side."""
    lines = {}
    for i, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        sides = {"teacher": output(theirs), "student": output(ours)}
        if weights is not None:
            sides["weight"] = f"{weights[i]:.6f}".rstrip("0")
        lines[f"stage{i + 1}"] = nested(mapping(sides))
    return mapping(lines)


def model(network: Network, source: str) -> str:
    return mapping({"key": f"'{network.key}'", "kwargs": f"{{{network.options}}}", "src_ckpt": source})


def heads(network: Network) -> str:
    """Options of HSAKD's heads."""
    lines = "".join(
        f"\n    - {{path: 'model.{path}', channels: {network.size(path)[0]}, num_blocks: {num_blocks}}}"
        for path, num_blocks in zip(network.head_maps or network.maps, network.num_blocks, strict=True)
    )
    options = {"num_classes": "100", "block": f"'{network.block}'"}
    if network.head_channels is not None:
        options["head_channels"] = str(network.head_channels)
    return mapping({**options, "stages": lines})


def head_hooks(network: Network) -> str:
    paths = [f"model.{path}" for path in network.head_maps or network.maps]
    return hook_lists([], [*paths, "heads"])


def regressor(teacher: Network, student: Network, theirs: str, ours: tuple[str, str], key: str) -> str:
    """A convolution from a map of the student to the shape of one of the teacher's."""
    path, io = ours
    # a ReLU leaves the shape as it is
    (in_channels, in_size), (out_channels, out_size) = student.size(path), teacher.size(theirs)
    kwargs = f"{{in_channels: {in_channels}, out_channels: {out_channels}, in_size: {in_size}, out_size: {out_size}}}"
    return mapping({"path": f"'model.{path}'", "io": f"'{io}'", "key": f"'{key}'", "kwargs": kwargs})


def vid_regressor(in_channels: int, out_channels: int, path: str) -> str:
    """VID's, from a map of the student to the width of the teacher's."""
    widths = f"in_channels: {in_channels}, middle_channels: {out_channels}, out_channels: {out_channels}"
    kwargs = f"{{{widths}, eps: 1.0e-5, init_pred_var: 5.0}}"
    return mapping({"path": f"'student_model.{path}'", "io": "'output'", "kwargs": kwargs})


def nested(text: str) -> str:
    return textwrap.indent(text, "  ")


def entries(teacher: Network, student: Network) -> dict[str, tuple[str, str]]:
    """The entries of a pair, by their name, which is their anchor too: a remark and the YAML."""
    count = len(student.maps)
    numbered = [f"stage{i + 1}" for i in range(count)]
    rate = 0.01 if student in SLOW else 0.05
    before = student.before_relu
    connectors = {
        name: nested(regressor(teacher, student, theirs, ours, "ABConnector"))
        for name, theirs, ours in zip(numbered, teacher.maps, before, strict=True)
    }
    regressors = {
        name: nested(vid_regressor(student.size(ours)[0], teacher.size(theirs)[0], ours))
        for name, theirs, ours in zip(numbered, teacher.maps, student.maps, strict=True)
    }
    wrapped = [f"student_model.{path}" for path in student.maps]
    inputs = [f"model.{path}" for path, io in before if io == "input"]
    outputs = [f"model.{path}" for path, io in before if io == "output"]
    connected = [f"adapters.{name}" for name in numbered]
    hint = hook_lists([], [f"model.{student.maps[1]}", "adapters.regressor"])
    channels = teacher.size(teacher.maps[-1])[0]
    found: dict[str, tuple[str, str]] = {
        "pair": ("", f"'{student.slug}_from_{teacher.slug}'"),
        "lr": ("", f"{rate}"),
        "teacher": ("", model(teacher, f"&teacher_ckpt './resource/ckpt/{FOLDER}/ce-{teacher.slug}.pt'")),
        "student": ("", model(student, "")),
        "maps": (" # the maps that are compared", compared(teacher.maps, student.maps)),
        "teacher_maps": ("", names(teacher.maps)),
        "student_maps": ("", names(student.maps)),
        "teacher_map": ("", f"'{teacher.maps[-1]}'"),
        "student_map": ("", f"'{student.maps[-1]}'"),
        "teacher_channels": (" # of that map", f"{channels}"),
        "student_channels": ("", f"{student.size(student.maps[-1])[0]}"),
        "factor_channels": (" # half of the teacher's", f"{channels // 2}"),
        "teacher_pool": (" # its output is the vector before the last layer", f"'{teacher.pool}'"),
        "student_pool": ("", f"'{student.pool}'"),
        "teacher_linear": (" # the last layer", f"'{teacher.linear}'"),
        "student_linear": ("", f"'{student.linear}'"),
        "teacher_width": (" # of that vector", f"{teacher.width}"),
        "student_width": ("", f"{student.width}"),
        "hint": (" # of the teacher's second stage", f"'{teacher.maps[1]}'"),
        "hint_hooks": ("", hint),
        "regressor": ("", regressor(teacher, student, teacher.maps[1], (student.maps[1], "output"), "ConvRegressor")),
        "regressors": ("", mapping(regressors)),
        "regressor_hooks": ("", hook_lists([], [*wrapped, *(f"regressor_dict.{name}" for name in numbered)])),
        "regressor_pairs": ("", compared(teacher.maps, [f"regressor_dict.{name}" for name in numbered])),
        "connectors": ("", mapping(connectors)),
        "connector_hooks": ("", hook_lists(inputs, [*outputs, *connected])),
        "student_end": (" # what comes after its maps", names([*student.after_maps, student.linear])),
        "signs": (" # with the signs before the last ReLU", names(teacher.signs or teacher.maps)),
        "connector_pairs": (
            "",
            compared(teacher.signs or teacher.maps, connected, [0.003 * 2.0 ** (i - count + 1) for i in range(count)]),
        ),
        "teacher_heads": ("", heads(teacher)),
        "teacher_head_hooks": ("", head_hooks(teacher)),
        "student_heads": ("", heads(student)),
        "student_head_hooks": ("", head_hooks(student)),
    }
    return found


ALWAYS = ("pair", "lr", "teacher", "student")


def pair_block(teacher: Network, student: Network, body: str | None = None) -> str:
    """The block ``pair``: the entries that ``body`` refers to, or all of them."""
    used = None if body is None else set(re.findall(r"\*(\w+)", body))
    lines = ["pair: # for another one put its block of configs/README.md here\n"]
    for name, (remark, value) in entries(teacher, student).items():
        if used is None or name in used or name in ALWAYS:
            key = "name" if name == "pair" else name
            first, *rest = value.split("\n")
            head = f"{key}: &{name}" + (f" {first}" if first else "") + remark
            lines.append(nested("\n".join([head, *rest])) + "\n")
    return "".join(lines)


# methods


@dataclass(frozen=True)
class Stage:
    """A stage of training.

    Args:
        teacher: YAML of that side.
        student: YAML of that side.
        terms: YAML of the sub-terms.
        remark: of the stage, where there are several.
        epochs: number of epochs.
        lr: learning rate.
        milestones: after which the rate is a tenth.
        nesterov: of SGD.
        trains_student: whether TALD's place is here.
    """

    teacher: str
    student: str
    terms: str
    remark: str = ""
    epochs: int = 240
    lr: str = "*lr"
    milestones: tuple[int, ...] = (150, 180, 210)
    nesterov: bool = False
    trains_student: bool = True


@dataclass(frozen=True)
class Method:
    """A host method.

    Args:
        label: its name.
        source: what the name stands for, authors and venue.
        facts: what is whose, in sentences.
        stages: of training.
        accuracy: of ResNet-20 from ResNet-56 in RepDistiller's README.
        dataset_wrapper: of the training set.
        flips: whether the transform of the training set flips images.
        is_adversarial: whether it has a search of its own.
        published: a sentence, where that README does not have it.
    """

    label: str
    source: str
    facts: str
    stages: tuple[Stage, ...]
    accuracy: str | None = None
    dataset_wrapper: str | None = None
    flips: bool = True
    is_adversarial: bool = False
    published: str = ""


def side(*lines: str, proc: str = "forward_batch_only", trained: bool) -> str:
    return "\n".join([f"forward_proc: '{proc}'", *lines, f"requires_grad: {trained}"])


def wrapper(key: str, *lines: str) -> str:
    kwargs = "\n".join(["kwargs:", *(nested(line) for line in lines)])
    return f"auxiliary_model_wrapper:\n  key: '{key}'\n{nested(kwargs)}"


def frozen(*lines: str, **options: str) -> str:
    return side("wrapper: 'DataParallel'", *lines, trained=False, **options)


def trained(*lines: str, **options: str) -> str:
    return side("wrapper: 'DistributedDataParallel'", *lines, trained=True, **options)


def hooks(outputs: str, inputs: str = "[]") -> str:
    return f"forward_hook: {{input: {inputs}, output: {outputs}}}"


NO_STUDENT = side("auxiliary_model_wrapper: {key: 'EmptyModule'}", trained=False)


def term(name: str, loss: str, *options: str, weight: str, remark: str = "") -> str:
    kwargs = nested("\n".join(options))
    kwargs = f"kwargs:\n{kwargs}" if options else "kwargs: {}"
    criterion = textwrap.indent(f"key: '{loss}'{remark}\n{kwargs}", "    ")
    return f"{name}:\n  criterion:\n{criterion}\n  weight: {weight}\n"


LOGITS = (
    "student_module_path: '.'",
    "student_module_io: 'output'",
    "teacher_module_path: '.'",
    "teacher_module_io: 'output'",
    "temperature: 4.0",
)
CE = """\
ce:
  criterion: {key: 'CrossEntropyLoss', kwargs: {reduction: 'mean'}}
  criterion_wrapper:
    key: 'SimpleLossWrapper'
    kwargs:
      input: {is_from_teacher: False, module_path: '.', io: 'output'}
      target: {uses_label: True}
  weight: 1.0
"""
KD = term(
    "kd", "KDLoss", *LOGITS, "alpha: 0.1", "reduction: 'batchmean'", weight="1.0", remark=" # 0.1 CE + 0.9 T^2 KL"
)
# with alpha 0 torchdistill's loss is the divergence alone, without the square of the temperature
WITHOUT_KD = term(
    "kd",
    "KDLoss",
    *LOGITS,
    "alpha: 0.0",
    "reduction: 'batchmean'",
    weight="0.0 # 16.0, the square of the temperature, adds KD",
    remark=" # the divergence alone",
)


def single(teacher: str, student: str, own_term: str) -> tuple[Stage, ...]:
    """One stage with cross-entropy, a term of the method's own, and KD without weight."""
    return (Stage(teacher, student, CE + own_term + WITHOUT_KD),)


METHODS = {
    "kd": Method(
        "KD",
        "knowledge distillation (Hinton et al., 2015)",
        "RepDistiller's: temperature 4, weights 0.1 of cross-entropy and 0.9 of the divergence.",
        (Stage(frozen(), trained(), KD),),
        "70.66",
    ),
    "fitnet": Method(
        "FitNet",
        "hints (Romero et al., ICLR 2015)",
        "RepDistiller's: one stage in place of the paper's two; the second of the stages; a convolution with BN and "
        "ReLU from the student's map to the shape of the teacher's; weight 100.",
        single(
            frozen(hooks("[*hint]")),
            side(
                wrapper("Adapters", "adapters:\n  regressor: *regressor"),
                "forward_hook: *hint_hooks",
                trained=True,
            ),
            """\
hint:
  criterion: {key: 'MSELoss', kwargs: {reduction: 'mean'}}
  criterion_wrapper:
    key: 'SimpleLossWrapper'
    kwargs:
      input: {is_from_teacher: False, module_path: 'adapters.regressor', io: 'output'}
      target: {is_from_teacher: True, module_path: *hint, io: 'output'}
  weight: 100.0
""",
        ),
        "69.21",
    ),
    "at": Method(
        "AT",
        "attention transfer (Zagoruyko and Komodakis, ICLR 2017)",
        "RepDistiller's: all stages, the mean of squares over channels, weight 1000, and the larger map pooled to the "
        "size of the smaller one.",
        single(
            frozen(hooks("*teacher_maps")),
            trained(hooks("*student_maps")),
            term("at", "PooledATLoss", "at_pairs: *maps", weight="1000.0"),
        ),
        "70.55",
    ),
    "sp": Method(
        "SP",
        "similarity-preserving distillation (Tung and Mori, ICCV 2019)",
        "RepDistiller's: the last map, weight 3000.",
        single(
            frozen(hooks("[*teacher_map]")),
            trained(hooks("[*student_map]")),
            term(
                "sp",
                "SPLoss",
                "student_output_path: *student_map",
                "teacher_output_path: *teacher_map",
                weight="3000.0",
            ),
        ),
        "69.67",
    ),
    "cc": Method(
        "CC",
        "correlation congruence (Peng et al., ICCV 2019)",
        "RepDistiller's: a linear layer to 128 features on the vector before the last layer of each network, both "
        "trained; its loss, which is not the paper's; weight 0.02.",
        single(
            side(
                wrapper(
                    "Linear4CCKD",
                    "input_module: {path: &teacher_vector !join ['model.', *teacher_linear], io: 'input'}",
                    "linear_kwargs: {in_features: *teacher_width, out_features: &feature_dim 128, bias: True}",
                ),
                "forward_hook: {input: [*teacher_vector], output: ['linear']}",
                trained=True,
            )
            + "\nfrozen_modules: ['model']",
            side(
                wrapper(
                    "Linear4CCKD",
                    "input_module: {path: &student_vector !join ['model.', *student_linear], io: 'input'}",
                    "linear_kwargs: {in_features: *student_width, out_features: *feature_dim, bias: True}",
                ),
                "forward_hook: {input: [*student_vector], output: ['linear']}",
                trained=True,
            ),
            term(
                "cc",
                "CCLoss",
                "student_linear_path: 'linear'",
                "teacher_linear_path: 'linear'",
                weight="0.02",
            ),
        ),
        "69.63",
    ),
    "vid": Method(
        "VID",
        "variational information distillation (Ahn et al., CVPR 2019)",
        "RepDistiller's: all stages, three convolutions of 1 x 1 with the teacher's width, variances that start at 5, "
        "weight 1, and the larger map pooled to the size of the smaller one.",
        single(
            frozen(hooks("*teacher_maps")),
            side(
                wrapper("VariationalDistributor4VID", "regressors: *regressors"),
                "forward_hook: *regressor_hooks",
                trained=True,
            ),
            term("vid", "PooledVIDLoss", "feature_pairs: *regressor_pairs", weight="1.0"),
        ),
        "70.38",
    ),
    "rkd": Method(
        "RKD",
        "relational knowledge distillation (Park et al., CVPR 2019)",
        "RepDistiller's: the vector before the last layer, weights 25 of distances and 50 of angles, weight 1.",
        single(
            frozen(hooks("[*teacher_pool]")),
            trained(hooks("[*student_pool]")),
            term(
                "rkd",
                "RKDLoss",
                "student_output_path: *student_pool",
                "teacher_output_path: *teacher_pool",
                "dist_factor: 25.0",
                "angle_factor: 50.0",
                "reduction: 'mean'",
                weight="1.0",
            ),
        ),
        "69.61",
    ),
    "pkt": Method(
        "PKT",
        "probabilistic knowledge transfer (Passalis and Tefas, ECCV 2018)",
        "RepDistiller's: the vector before the last layer, weight 30000.",
        single(
            frozen(hooks("[]", "[*teacher_linear]")),
            trained(hooks("[]", "[*student_linear]")),
            term(
                "pkt",
                "PKTLoss",
                "student_module_path: *student_linear",
                "student_module_io: 'input'",
                "teacher_module_path: *teacher_linear",
                "teacher_module_io: 'input'",
                "eps: 1.0e-7",
                weight="30000.0",
            ),
        ),
        "70.34",
    ),
    "ab": Method(
        "AB",
        "activation boundaries (Heo et al., AAAI 2019)",
        "RepDistiller's: 30 epochs in which the stages of the student learn the signs of the teacher's maps before "
        "their last ReLU, with weights of 0.003, halved from each stage to the one before it, and a convolution with "
        "BN where shapes differ; then cross-entropy alone. Signs are read where the teacher has them after the ReLU. "
        "Our reading, for other pairs: a Wide ResNet trains its last BN too, which RepDistiller leaves as it is; "
        "ShuffleNetV2's maps are those after the ReLU.",
        (
            Stage(
                frozen(hooks("*signs")),
                side(
                    wrapper("Adapters", "adapters: *connectors") + "\n  frozen_modules: *student_end",
                    "forward_hook: *connector_hooks",
                    trained=True,
                ),
                term(
                    "ab",
                    "AltActTransferLoss",
                    "feature_pairs: *connector_pairs",
                    "margin: 1.0",
                    "reduction: 'mean'",
                    weight="1.0",
                ),
                "the student's stages",
                epochs=30,
                milestones=(),
                trains_student=False,
            ),
            Stage(frozen(), trained(), CE + WITHOUT_KD, "the student"),
        ),
        "69.47",
    ),
    "ft": Method(
        "FT",
        "factor transfer (Kim et al., NeurIPS 2018)",
        "RepDistiller's: the last map; 30 epochs for the paraphraser, which halves the teacher's channels; the mean "
        "over channels of the squared factors, compared in l1; weight 200.",
        (
            Stage(
                side(
                    wrapper(
                        "Teacher4FactorTransfer",
                        "minimal:",
                        "input_module_path: &wrapped_teacher_map !join ['teacher_model.', *teacher_map]",
                        "paraphraser_kwargs: &paraphraser_kwargs\n"
                        "  k: 0.5\n"
                        "  num_input_channels: *teacher_channels\n"
                        "  kernel_size: 3\n"
                        "  stride: 1\n"
                        "  padding: 1\n"
                        "  uses_bn: False",
                        "paraphraser_ckpt: &paraphraser_ckpt !join [*experiment, '_paraphraser.pt']",
                        "uses_decoder: True",
                    ),
                    hooks("[*wrapped_teacher_map, 'paraphraser']"),
                    trained=True,
                )
                + "\nfrozen_modules: ['teacher_model']",
                NO_STUDENT,
                """\
reconstruction:
  criterion: {key: 'MSELoss', kwargs: {reduction: 'mean'}}
  criterion_wrapper:
    key: 'SimpleLossWrapper'
    kwargs:
      input: {is_from_teacher: True, module_path: 'paraphraser', io: 'output'}
      target: {is_from_teacher: True, module_path: *wrapped_teacher_map, io: 'output'}
  weight: 1.0
""",
                "the paraphraser",
                epochs=30,
                lr="0.01 # RepDistiller has 0.05 where VGG-8 is the student",
                milestones=(),
                trains_student=False,
            ),
            Stage(
                side(
                    wrapper(
                        "Teacher4FactorTransfer",
                        "minimal:",
                        "input_module_path: *wrapped_teacher_map",
                        "paraphraser_kwargs: *paraphraser_kwargs",
                        "paraphraser_ckpt: *paraphraser_ckpt",
                        "uses_decoder: False",
                    ),
                    hooks("[*wrapped_teacher_map, 'paraphraser']"),
                    trained=False,
                ),
                side(
                    wrapper(
                        "Student4FactorTransfer",
                        "input_module_path: &wrapped_student_map !join ['student_model.', *student_map]",
                        "translator_kwargs:\n"
                        "  num_input_channels: *student_channels\n"
                        "  num_output_channels: *factor_channels\n"
                        "  kernel_size: 3\n"
                        "  stride: 1\n"
                        "  padding: 1\n"
                        "  uses_bn: True",
                    ),
                    hooks("[*wrapped_student_map, 'translator']"),
                    trained=True,
                ),
                CE
                + term(
                    "ft",
                    "FactorMapLoss",
                    "paraphraser_path: 'paraphraser'",
                    "translator_path: 'translator'",
                    weight="200.0",
                )
                + WITHOUT_KD,
                "the student",
            ),
        ),
        "69.84",
    ),
    "nst": Method(
        "NST",
        "neuron selectivity transfer (Huang and Wang, 2017)",
        "RepDistiller's: all stages, weight 50, and the larger map pooled to the size of the smaller one.",
        single(
            frozen(hooks("*teacher_maps")),
            trained(hooks("*student_maps")),
            term("nst", "NSTLoss", "nst_pairs: *maps", weight="50.0"),
        ),
        "69.60",
    ),
    "crd": Method(
        "CRD",
        "contrastive representation distillation (Tian et al., ICLR 2020)",
        "RepDistiller's: a linear layer to 128 features on the vector before the last layer of each network, both "
        "trained; 16,384 negatives an image from other classes, temperature 0.07, momentum 0.5, weight 0.8.",
        single(
            side(
                wrapper(
                    "Linear4CRD",
                    "input_module_path: &teacher_vector !join ['model.', *teacher_pool]",
                    "linear_kwargs: {in_features: *teacher_width, out_features: &feature_dim 128, bias: True}",
                    "power: 2",
                ),
                hooks("[*teacher_vector, 'normalizer']"),
                proc="forward_batch_supp_dict",
                trained=True,
            )
            + "\nfrozen_modules: ['model']",
            side(
                wrapper(
                    "Linear4CRD",
                    "input_module_path: &student_vector !join ['model.', *student_pool]",
                    "linear_kwargs: {in_features: *student_width, out_features: *feature_dim, bias: True}",
                    "power: 2",
                ),
                hooks("[*student_vector, 'normalizer']", "['empty']"),
                proc="forward_batch_supp_dict",
                trained=True,
            ),
            term(
                "crd",
                "CRDLoss",
                "teacher_norm_module_path: 'normalizer'",
                "student_norm_module_path: 'normalizer'",
                "student_empty_module_path: 'empty'",
                "input_size: *feature_dim",
                "output_size: &num_samples 50000 # the memory has a slot for every image of the training set",
                "num_negative_samples: *num_negatives",
                "num_samples: *num_samples",
                "temperature: 0.07",
                "momentum: 0.5",
                "eps: 1.0e-7",
                weight="0.8",
            ),
        ),
        "71.16",
        "\n  key: 'CRDDatasetWrapper'\n"
        "  kwargs: {num_negative_samples: &num_negatives 16384, mode: 'exact', ratio: 1.0}",
    ),
    "sskd": Method(
        "SSKD",
        "self-supervision (Xu et al., ECCV 2020)",
        "The official code's: 60 epochs for the teacher's self-supervision module, at 0.05 and with a tenth of the "
        "rate after 30 and 45; four rotations of each image, flipped before the turn and cropped after it; the "
        "weights, temperatures and ratios. The student's schedule is RepDistiller's.",
        (
            Stage(
                side(
                    wrapper(
                        "SSWrapper4SSKD",
                        "input_module: {path: &teacher_vector !join ['model.', *teacher_pool], io: 'output'}",
                        "feat_dim: *teacher_width",
                        "freezes_ss_module: False",
                        "ss_module_ckpt: &teacher_ss_ckpt !join [*experiment, '_teacher_ss_module.pt']",
                    ),
                    hooks("[*teacher_vector, 'ss_module']"),
                    proc="forward_batch4sskd",
                    trained=True,
                )
                + "\nfrozen_modules: ['model']",
                NO_STUDENT,
                term(
                    "aux_task",
                    "AuxSSKDLoss",
                    "module_path: 'ss_module'",
                    "module_io: 'output'",
                    "reduction: 'mean'",
                    weight="1.0",
                ),
                "the teacher's self-supervision module",
                epochs=60,
                lr="0.05",
                milestones=(30, 45),
                trains_student=False,
            ),
            Stage(
                side(
                    wrapper(
                        "SSWrapper4SSKD",
                        "input_module: {path: *teacher_vector, io: 'output'}",
                        "feat_dim: *teacher_width",
                        "freezes_ss_module: True",
                        "ss_module_ckpt: *teacher_ss_ckpt",
                    ),
                    "forward_hook:\n  input: []\n  output: "
                    "[*teacher_vector, &teacher_logits !join ['model.', *teacher_linear], 'ss_module']",
                    proc="forward_batch4sskd",
                    trained=False,
                ),
                side(
                    wrapper(
                        "SSWrapper4SSKD",
                        "input_module: {path: &student_vector !join ['model.', *student_pool], io: 'output'}",
                        "feat_dim: *student_width",
                        "freezes_ss_module: False",
                        "ss_module_ckpt: !join [*experiment, '_student_ss_module.pt']",
                    ),
                    "forward_hook:\n  input: []\n  output: "
                    "[*student_vector, &student_logits !join ['model.', *student_linear], 'ss_module']",
                    proc="forward_batch4sskd",
                    trained=True,
                ),
                term(
                    "sskd",
                    "SSKDLoss",
                    "student_linear_module_path: *student_logits",
                    "teacher_linear_module_path: *teacher_logits",
                    "student_ss_module_path: 'ss_module'",
                    "teacher_ss_module_path: 'ss_module'",
                    "kl_temp: 4.0",
                    "ss_temp: 0.5",
                    "tf_temp: 4.0",
                    "ss_ratio: 0.75",
                    "tf_ratio: 1.0",
                    "loss_weights: [0.1, 0.9, 10.0, 2.7]",
                    "reduction: 'batchmean'",
                    weight="1.0",
                ),
                "the student",
            ),
        ),
        dataset_wrapper="{key: 'SSKDRotations'}",
        flips=False,
        published="Its authors report 71.49 %, with a teacher of 73.44 %.",
    ),
    "hsakd": Method(
        "HSAKD",
        "hierarchical self-supervised augmented distillation (Yang et al., IJCAI 2021)",
        "The official code's: 100 epochs for the teacher's heads, on its frozen network, with a tenth of the rate "
        "after 30, 60 and 90; Nesterov's momentum; four rotations of each image; temperature 3. The student's "
        "schedule is RepDistiller's.",
        (
            Stage(
                side(
                    wrapper(
                        "HSAKDWrapper",
                        "<<: *teacher_heads",
                        "heads_ckpt: &heads_ckpt !join [*experiment, '_teacher_heads.pt']",
                    ),
                    "forward_hook: *teacher_head_hooks",
                    proc="forward_batch4sskd",
                    trained=True,
                )
                + "\nfrozen_modules: ['model']",
                NO_STUDENT,
                term("heads", "HSAKDHeadsLoss", weight="1.0"),
                "the teacher's heads",
                epochs=100,
                lr="0.05",
                milestones=(30, 60, 90),
                nesterov=True,
                trains_student=False,
            ),
            Stage(
                side(
                    wrapper("HSAKDWrapper", "<<: *teacher_heads", "heads_ckpt: *heads_ckpt", "freezes_heads: True"),
                    "forward_hook: *teacher_head_hooks",
                    proc="forward_batch4sskd",
                    trained=False,
                ),
                side(
                    wrapper("HSAKDWrapper", "<<: *student_heads"),
                    "forward_hook: *student_head_hooks",
                    proc="forward_batch4sskd",
                    trained=True,
                ),
                term(
                    "hsakd",
                    "HSAKDLoss",
                    "student_module_path: '.'",
                    "teacher_module_path: '.'",
                    "temperature: 3.0",
                    weight="1.0",
                ),
                "the student",
                nesterov=True,
            ),
        ),
        dataset_wrapper="{key: 'FourRotations'}",
        published="Its authors report 72.58 %, with a teacher of 73.44 %.",
    ),
    "bss": Method(
        "BSS",
        "samples at the decision boundary (Heo et al., AAAI 2019)",
        "The official code's: 64 base samples, temperature 3, the weights and how they shrink, 10 steps of 0.3. Our "
        "reading: samples stay in the range of real images. Ours: RepDistiller's schedule, in which TALD's paper "
        "compares the two.",
        (
            Stage(
                frozen(),
                trained(),
                term(
                    "bss",
                    "BSSLoss",
                    "num_base: 64",
                    "temperature: 3.0",
                    "kd_weight: 3.0",
                    "bss_weight: 2.0",
                    "adversary: {key: 'BSS', kwargs: {num_steps: 10, step_size: 0.3}}",
                    "threat: {<<: *normalize_kwargs, norm: 'l2', eps: .inf, space: 'input'}",
                    weight="1.0",
                    remark=" # with cross-entropy and distillation of its own",
                ),
            ),
        ),
        is_adversarial=True,
    ),
}


# TALD


@dataclass(frozen=True)
class Variant:
    """A form of TALD.

    Args:
        suffix: of the file's name.
        title: beginning of the header.
        facts: paragraphs of the header.
        term: YAML of the sub-term.
    """

    suffix: str
    title: str
    facts: tuple[str, ...]
    term: str


def svgd(kwargs: str) -> str:
    return f"adversary:\n  key: 'SVGD'\n  kwargs:{kwargs}"


PAPERS = (
    "The paper's: K = 4 particles, L = 1 step, eta = 0.1, eps = 0.3, tau = 10, weight 0.01, KL(T(x') || T(x)) as the "
    "objective, {bandwidth}every image attacked, steps of l2 length eta."
)
BALL = (
    "Our reading: eps is the radius of an l2 ball around the normalised image (the paper names no norm for it{other}); "
    "examples stay in the range of real images; student_bn 'batch'."
)
IDENTITY = (
    "At a bandwidth of 1e-3 the kernel is the identity and the repulsion is zero: each particle follows its own "
    "gradient from its own random start. {median} a bandwidth at which the kernel acts."
)
MEDIAN_FILE = IDENTITY.format(median="kd_tald_median-* has")
FOUR = "num_particles: 4, num_steps: 1, step_size: 0.1, noise_factor: 10.0"
L2_BALL = "threat: {<<: *normalize_kwargs, norm: 'l2', eps: 0.3, space: 'input'}"
AS_PAPER = ("objective: 'kl_teacher_clean_teacher'", "student_bn: 'batch'")


def tald(*options: str) -> str:
    return term("tald", "TALDLoss", *options, weight="0.01")


PAPER_TERM = tald(svgd(f" {{{FOUR}, bandwidth: 1.0e-3}}"), L2_BALL, *AS_PAPER)
ADDED = Variant(
    "tald",
    "with TALD (WACV 2023) added",
    (
        PAPERS.format(bandwidth="bandwidth 1e-3, "),
        BALL.format(other=""),
        IDENTITY.format(median="bandwidth: 'median' is"),
    ),
    PAPER_TERM,
)
VARIANTS = (
    Variant(
        "tald_paper",
        "with TALD as its paper has it (WACV 2023)",
        (
            PAPERS.format(bandwidth="bandwidth 1e-3, "),
            BALL.format(other="; the other reading is kd_tald_paper_linf-*"),
            MEDIAN_FILE,
        ),
        PAPER_TERM,
    ),
    Variant(
        "tald_paper_linf",
        "with TALD as its paper has it (WACV 2023), the ball read as l-infinity",
        (
            PAPERS.format(bandwidth="bandwidth 1e-3, "),
            "In this ball such a step is 0.6 % of the random start, so the particles are nearly noise.",
            "Our reading: eps is the radius of an l-infinity ball around the normalised image (the paper names no "
            "norm for it; kd_tald_paper-* has l2); examples stay in the range of real images; student_bn 'batch'.",
            MEDIAN_FILE,
        ),
        tald(
            svgd(f"\n    {{{FOUR}, bandwidth: 1.0e-3, norm: 'l2'}}"),
            L2_BALL.replace("'l2'", "'linf'"),
            *AS_PAPER,
        ),
    ),
    Variant(
        "tald_median",
        "with TALD (WACV 2023) at a bandwidth at which its particles repel each other",
        (
            PAPERS.format(bandwidth=""),
            "Ours: the median bandwidth, in place of the paper's 1e-3, at which the kernel is the identity and the "
            "repulsion zero.",
            BALL.format(other=""),
        ),
        tald(svgd(f" {{{FOUR}, bandwidth: 'median'}}"), L2_BALL, *AS_PAPER),
    ),
    Variant(
        "tald_fast",
        "with TALD as its paper has it (WACV 2023), in fewer samples",
        (
            "The paper's: L = 1 step, eta = 0.1, eps = 0.3, tau = 10, weight 0.01, KL(T(x') || T(x)) as the objective, "
            "bandwidth 1e-3, every image attacked, steps of l2 length eta.",
            "Ours: one particle in place of four, and the term in every fourth step alone, where it counts four times. "
            "At a bandwidth of 1e-3 particles do not see each other, so the loss is the paper's in expectation, from a "
            "sixteenth of the samples.",
            BALL.format(other=""),
        ),
        tald(svgd(f" {{{FOUR.replace('4', '1', 1)}, bandwidth: 1.0e-3}}"), L2_BALL, *AS_PAPER, "every: 4"),
    ),
    Variant(
        "tald_code_exact",
        "with TALD as its published code has it, not its paper (WACV 2023)",
        (
            "The code's: directions probed at a distance of 10 and applied at 0.0005, MSE of the softmax as the "
            "objective, the first 10 images of a batch attacked, the clean images among the rows of the loss, "
            "particles and clean images in one pass of the student in train mode, values between -2.5 and 2.5 after "
            "normalisation, weight 0.01 (in its script).",
            "Exact but for the host's terms, which torchdistill computes on its own clean pass: batch normalisation "
            "there sees the clean images alone, and its running statistics move twice a step.",
            MEDIAN_FILE,
        ),
        tald(
            "adversary:\n  key: 'VirtualSVGD'\n"
            "  kwargs: {num_particles: 4, num_steps: 1, probe_radius: 10.0, bandwidth: 1.0e-3}",
            "threat: {<<: *normalize_kwargs, norm: 'l2', eps: 0.0005, space: 'input', bounds: [-2.5, 2.5]}",
            "objective: 'mse_teacher_clean_teacher'",
            "num_attacked: 10",
            "include_clean: True",
            "forward: 'joint'",
            "student_bn: 'train'",
        ),
    ),
)


# files

SKELETON = Template(
    """\
$header
dependencies:
  - name: 'torchdistill_adv'

$pair
datasets:
  &train_set cifar100/train: !import_call
    key: 'torchvision.datasets.CIFAR100'
    init:
      kwargs:
        root: &root '~/datasets/cifar100'
        train: True
        download: True
        transform: !import_call
          key: 'torchvision.transforms.Compose'
          init:
            kwargs:
              transforms:
                - !import_call {key: 'torchvision.transforms.RandomCrop', init: {kwargs: {size: 32, padding: 4}}}
$flip                - &to_tensor !import_call {key: 'torchvision.transforms.ToTensor'}
                - &normalize !import_call
                  key: 'torchvision.transforms.Normalize'
                  init: {kwargs: &normalize_kwargs {mean: [0.5071, 0.4867, 0.4408], std: [0.2675, 0.2565, 0.2761]}}
  &test_set cifar100/test: !import_call
    key: 'torchvision.datasets.CIFAR100'
    init:
      kwargs:
        root: *root
        train: False
        download: True
        transform: !import_call
          key: 'torchvision.transforms.Compose'
          init: {kwargs: {transforms: [*to_tensor, *normalize]}}

models:
$models
train:
  log_freq: 100
$train
test:
  test_data_loader:
    dataset_id: *test_set
    sampler: *in_order
    kwargs: *evaluation
"""
)
FLIP = """\
                - !import_call {key: 'torchvision.transforms.RandomHorizontalFlip', init: {kwargs: {p: 0.5}}}
"""
LOADERS = Template(
    """\
train_data_loader:
  dataset_id: *train_set
$wrapper  sampler: {class_or_func: !import_get {key: 'torch.utils.data.RandomSampler'}}
  kwargs: {batch_size: 64, num_workers: 8, pin_memory: True, drop_last: False}
val_data_loader: # the runner keeps the checkpoint that is best here; the published results are of the last epoch
  dataset_id: *test_set
  sampler: &in_order {class_or_func: !import_get {key: 'torch.utils.data.SequentialSampler'}}
  kwargs: &evaluation {batch_size: 64, num_workers: 4, pin_memory: True}
"""
)
STAGE = Template(
    """\
pre_epoch_process: $process
num_epochs: $epochs
$loaders$sides
optimizer:
  key: 'SGD'
  kwargs: {lr: $lr, momentum: 0.9, weight_decay: 0.0005$nesterov}$lr_remark
${scheduler}criterion:
  key: 'WeightedSumLoss'
  kwargs:
    sub_terms:
$terms"""
)
RECIPE = (
    "RepDistiller's setting for CIFAR-100: SGD at 0.05 (0.01 for MobileNetV2 and the ShuffleNets), momentum 0.9, "
    "weight decay 5e-4, batches of 64, 240 epochs, a tenth of the rate after 150, 180 and 210."
)
WITH_KD = (
    "RepDistiller's results are without KD, so the term kd has weight 0; 16.0, the square of its temperature, adds KD "
    "at RepDistiller's weight of 1, as Eq. 4 of TALD's paper does."
)


def paragraph(text: str) -> str:
    """Text as comment lines."""
    return textwrap.fill(text, 120, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False) + "\n"


def header(title: str, preparation: str, path: str, facts: Sequence[str]) -> str:
    text = paragraph(title) + paragraph(preparation)
    text += f"#\n#   torchdistill-adv train --config configs/{path}.yaml\n#\n"
    return text + "".join(map(paragraph, facts)) + MARK


def stage_text(method: Method, stage: Stage, is_first: bool, added: str = "") -> str:
    searches = stage.trains_student and (added or method.is_adversarial)
    lr, _, remark = stage.lr.partition(" # ")
    milestones = list(stage.milestones)
    wrapped = mapping({"dataset_wrapper": method.dataset_wrapper})[1:] + "\n" if method.dataset_wrapper else ""
    sides = f"teacher:\n{nested(stage.teacher)}\nstudent:\n{nested(stage.student)}"
    return STAGE.substitute(
        process="'bind_adversarial_losses'" if searches else "'eval_teacher' # torchdistill leaves it in train mode",
        epochs=stage.epochs,
        loaders=LOADERS.substitute(wrapper=wrapped.replace("\n  ", "\n    ")) if is_first else "",
        sides=sides,
        lr=lr,
        lr_remark=f" # {remark}" if remark else "",
        nesterov=", nesterov: True" if stage.nesterov else "",
        scheduler=f"scheduler:\n  key: 'MultiStepLR'\n  kwargs: {{milestones: {milestones}, gamma: 0.1}}\n"
        if milestones
        else "",
        terms=textwrap.indent(stage.terms + (added if stage.trains_student else ""), 6 * " "),
    )


def host_config(name: str, variant: Variant | None = None) -> tuple[str, str]:
    """Path and text of a host method's configuration, or of one with TALD."""
    method = METHODS[name]
    teacher, student = DEFAULT
    kind = name if variant is None else f"{name}_{variant.suffix}"
    suffix = f"{student.slug}_from_{teacher.slug}"
    path = f"{FOLDER}/{kind}-{suffix}"
    added = "" if variant is None else variant.term
    texts = [stage_text(method, stage, not i, added) for i, stage in enumerate(method.stages)]
    if len(texts) > 1:
        texts = [
            f"stage{i + 1}: # {stage.remark}\n{nested(text)}"
            for i, (stage, text) in enumerate(zip(method.stages, texts, strict=True))
        ]
    train = nested("".join(texts))
    stem = f"!join ['./resource/ckpt/{FOLDER}/{kind}-', *pair]"
    saved = f"!join [&experiment {stem}, '.pt']" if "*experiment" in train else stem.replace("]", ", '.pt']")
    models = f"  teacher_model: *teacher\n  student_model:\n    <<: *student\n    dst_ckpt: {saved}\n"
    networks = f"{student.label} from {teacher.label}"
    if variant is None:
        title = f"{method.label}, {method.source}, on CIFAR-100: {networks}."
        facts = [RECIPE, method.facts]
        if method.accuracy:
            facts.append(f"RepDistiller reports {method.accuracy} %, with a teacher of 72.34 %.")
        facts += [method.published] if method.published else []
        facts += [WITH_KD] if WITHOUT_KD in method.stages[-1].terms else []
    else:
        title = f"{name}-{suffix}.yaml {variant.title}: {networks} on CIFAR-100."
        place = "; TALD is in the stage that trains the student" if len(texts) > 1 else ""
        facts = [f"The host is unchanged{place}.", *variant.facts]
        facts += [WITH_KD] if WITHOUT_KD in method.stages[-1].terms else []
    text = SKELETON.substitute(
        header=header(title, f"Train the teacher first, with ce-{teacher.slug}.yaml.", path, facts),
        pair=pair_block(teacher, student, models + train),
        flip=FLIP if method.flips else "",
        models=models,
        train=train,
    )
    return path, text


def teacher_config() -> tuple[str, str]:
    """The teacher of a pair, by cross-entropy."""
    teacher, student = DEFAULT
    path = f"{FOLDER}/ce-{teacher.slug}"
    stage = Stage("", "", CE, lr="0.05")
    text = stage_text(METHODS["kd"], stage, True)
    begin, start, end = (text.index(key) for key in ("num_epochs:", "teacher:", "optimizer:"))
    train = nested(text[begin:start] + "model:\n" + nested(trained()) + "\n" + text[end:])
    models = "  model:\n    <<: *teacher\n    src_ckpt:\n    dst_ckpt: *teacher_ckpt\n"
    facts = [
        RECIPE.replace(" (0.01 for MobileNetV2 and the ShuffleNets)", ""),
        "TALD's paper reports 72.34 % for this network. The models are torchdistill's.",
    ]
    title = f"The teacher of the methods on CIFAR-100 by cross-entropy alone: {teacher.label}."
    text = SKELETON.substitute(
        header=header(title, "Each pair of configs/README.md has its teacher in the block pair.", path, facts),
        pair=pair_block(teacher, student, models),
        flip=FLIP,
        models=models,
        train=train,
    )
    return path, text


def configurations() -> Iterator[tuple[str, str]]:
    """Path below ``configs/``, without the extension, and text of every file."""
    yield teacher_config()
    for name in METHODS:
        yield host_config(name)
        for variant in VARIANTS if name == "kd" else (ADDED,):
            yield host_config(name, variant)


README = Template(
    """\
$mark
# Configurations

| folder | what it holds |
|---|---|
| `cifar100` | The host methods of TALD's paper with and without TALD, as below. |
| `imagenet` | torchdistill's host methods with and without TALD: ResNet-34 to ResNet-18. |
| `cifar10`, `cifar100/robustbench`, `cifar100/trades`, `cifar100/generated` | Robust students, by `make.py`. |
| `digits` | The same on 1,797 images of 8 x 8, which need no GPU. |

`torchdistill-adv train --config FILE` runs one, `torchrun --nproc_per_node N -m torchdistill_adv train --config FILE`
runs it in N processes, each with the batch size of the file. Each header says what is the paper's, the code's and ours.

## Host methods on CIFAR-100

`<method>-$pair.yaml` is the method, `<method>_tald-$pair.yaml` the same with
TALD (KD has `kd_tald_paper`, `kd_tald_paper_linf`, `kd_tald_median`, `kd_tald_fast` and `kd_tald_code_exact`).
$teacher_file trains the teacher.

| method | file | term | weight | $pair, % |
|---|---|---|---|---|
$methods

The last column has published accuracies, which are not reproduced here: RepDistiller's, of the last epoch, or the
authors' for SSKD and HSAKD, whose teachers are others. TALD's paper has its numbers in figures only.

**With KD or without.** RepDistiller's numbers are without KD (`a = 0`), but Eq. 4 of TALD's paper has it beside every
host. The files have a term `kd` of weight 0; `--set` makes it 16, which is the square of its temperature:

```sh
torchdistill-adv train --config configs/cifar100/at_tald-$pair.yaml \\
  --set train.criterion.kwargs.sub_terms.kd.weight=16.0
```

(`train.stage2.criterion...` in AB and FT.) KD, BSS, SSKD and HSAKD have their own divergence.

## Teacher and student

The pair is the block `pair` of a file. To have another one, put its block from below there: it suits every file of
`cifar100` whose name ends in `$pair`, and $teacher_file for the teacher. The files
themselves have only the entries that they use. The names of checkpoints follow.

$pairs
"""
)


def methods_table() -> str:
    rows = []
    for name, method in METHODS.items():
        terms = "".join(stage.terms for stage in method.stages)
        weights = re.findall(r"^(\w+):\n(?:  .*\n)*?  weight: ([\d.]+)", terms, re.MULTILINE)
        key, weight = [(key, weight) for key, weight in weights if key != "ce" and float(weight)][-1]
        accuracy = method.accuracy or (re.findall(r"[\d.]+(?= %)", method.published) or ["-"])[0]
        rows.append(f"| {method.label}, {method.source} | `{name}` | `{key}` | {weight} | {accuracy} |")
    return "\n".join(rows)


def readme() -> str:
    teacher, student = DEFAULT
    blocks = []
    for title, pairs in (("The same style", SAME_STYLE), ("Different styles", PAIRS[len(SAME_STYLE) :])):
        blocks.append(f"### {title}")
        for theirs, ours in pairs:
            text = pair_block(theirs, ours)
            blocks.append(
                f"<details><summary>{theirs.label} to {ours.label}</summary>\n\n```yaml\n{text}```\n\n</details>"
            )
    return README.substitute(
        mark=README_MARK,
        pair=f"{student.slug}_from_{teacher.slug}",
        teacher_file=f"`ce-{teacher.slug}.yaml`",
        methods=methods_table(),
        pairs="\n\n".join(blocks),
    )


def main() -> int:
    """Write or check the files.

    Returns:
        The exit code: 1 if a check found differences.
    """
    parser = argparse.ArgumentParser(description="Write the host methods on CIFAR-100")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file is not what it should be")
    check = parser.parse_args().check
    wanted = {ROOT / f"{path}.yaml": text for path, text in configurations()} | {ROOT / "README.md": readme()}
    present = {path: path.read_text() for path in (*ROOT.rglob("*.yaml"), *ROOT.glob("README.md"))}
    ours = {path for path, text in present.items() if MARK in text}
    different = sorted(path for path in wanted.keys() | ours if wanted.get(path) != present.get(path))
    for path in different:
        print(path.relative_to(ROOT))
        if check:
            continue
        if path in wanted:
            path.write_text(wanted[path])
        else:
            path.unlink()
    return int(check and bool(different))


if __name__ == "__main__":
    sys.exit(main())
