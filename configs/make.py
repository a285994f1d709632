"""Writes the configurations of the robust family: all methods in the same few settings.

    python configs/make.py          # write every file
    python configs/make.py --check  # change nothing; fail if a file is not what would be written

torchdistill's YAML has no includes, and a reader wants the whole experiment in one file, so each file is complete. What
the files share is here once: the skeleton, the data, the networks and recipes. Then comes a :class:`Method` each, with
its terms as YAML; the published numbers; and in :func:`configurations` what goes with what.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template

ROOT = Path(__file__).resolve().parent
MARK = "# Written by configs/make.py: change it there.\n"

SKELETON = Template(
    """\
$title
#
#   torchdistill-adv train --config configs/$path.yaml
#
$facts
$mark
dependencies:
  - name: 'torchdistill_adv'

datasets:
$datasets
models:
$models
train:
  log_freq: 100
$binding$robust  num_epochs: $epochs
  train_data_loader:
    dataset_id: *train_set
$pairs    sampler: {class_or_func: !import_get {key: 'torch.utils.data.RandomSampler'}}
    kwargs: {batch_size: $batch_size, $workers, drop_last: True}
  val_data_loader: # the runner keeps the checkpoint that is best here, on clean images
    dataset_id: *val_set
    sampler: &in_order {class_or_func: !import_get {key: 'torch.utils.data.SequentialSampler'}}
    kwargs: &evaluation {batch_size: 500, $test_workers}
$sides  optimizer:
    key: 'SGD'
    kwargs: {lr: $lr, momentum: 0.9, weight_decay: $weight_decay}
$clipping  scheduler:
    key: 'MultiStepLR'
    kwargs: {milestones: $milestones, gamma: 0.1}
  criterion:
    key: 'WeightedSumLoss'
    kwargs:
      sub_terms:
$terms
test:
  test_data_loader:
    dataset_id: *test_set
    sampler: *in_order
    kwargs: *evaluation
"""
)
ROBUST_VALIDATION = Template(
    """\
  post_epoch_process: 'validate_robustly'
  robust_validation: # the checkpoint that is best here is kept too, and that of the last epoch
    every: 1
    num_images: 1000
    adversary: {key: 'PGD', kwargs: {num_steps: 10, step_size: $step_size, start: 'uniform'}}
    objective: 'ce_student'
    threat: {$threat}
    ckpt: *student_ckpt
    seed: 0
"""
)


# recipes


@dataclass(frozen=True)
class Recipe:
    """How long and how fast; SGD with momentum 0.9, a tenth of the rate after each milestone."""

    epochs: int
    milestones: tuple[int, ...]
    batch_size: int = 128
    weight_decay: float = 5e-4
    lr: float = 0.1
    max_grad_norm: float | None = None


ADAAD_RECIPE = Recipe(200, (100, 150))
TWICE_RECIPE = Recipe(400, (200, 300))
PGD_AT_RECIPE = Recipe(110, (100, 105))
TRADES_RECIPE = Recipe(76, (74,), weight_decay=2e-4)
VIT_RECIPE = Recipe(40, (35, 38), batch_size=64, weight_decay=1e-4, max_grad_norm=1.0)
BSS_RECIPE = Recipe(80, (39, 59), batch_size=256, weight_decay=1e-4)
DIGITS_RECIPE = Recipe(30, (20, 27), batch_size=64, max_grad_norm=1.0)


# data


@dataclass(frozen=True)
class Data:
    """Images, and what follows from them.

    Args:
        folder: below ``configs/`` and below the checkpoints.
        label: for the header.
        num_classes: number of classes.
        datasets: YAML of the data sets.
        workers: options of the data loaders, in training and in evaluation.
        values: what the YAML of the terms leaves open.
        robust_threat: of robust validation.
        robust_step: a quarter of its radius.
        recipe: of every method but those that are given another.
        recipe_note: for the header, of that recipe.
        note: for the header.
        wrapped: whether the networks are spread over the GPUs.
    """

    folder: str
    label: str
    num_classes: int
    datasets: str
    workers: tuple[str, str]
    values: Mapping[str, str]
    robust_threat: str
    robust_step: str
    recipe: Recipe
    recipe_note: str
    note: str
    wrapped: bool = True


CIFAR_DATASETS = Template(
    """\
&train_set $folder/train: !import_call
  key: 'torch.utils.data.Subset'
  init:
    kwargs:
      dataset: !import_call
        key: 'torchvision.datasets.$dataset'
        init:
          kwargs:
            root: &root '~/datasets/$folder'
            train: True
            download: True
            transform: !import_call
              key: 'torchvision.transforms.Compose'
              init:
                kwargs:
                  transforms:
                    - !import_call {key: 'torchvision.transforms.RandomCrop', init: {kwargs: {size: 32, padding: 4}}}
                    - !import_call {key: 'torchvision.transforms.RandomHorizontalFlip', init: {kwargs: {p: 0.5}}}
                    - &to_tensor !import_call {key: 'torchvision.transforms.ToTensor'}
      indices: !import_call {key: 'builtins.range', init: {args: [45000]}}
&val_set $folder/val: !import_call # the last 5,000 training images, without augmentation
  key: 'torch.utils.data.Subset'
  init:
    kwargs:
      dataset: !import_call
        key: 'torchvision.datasets.$dataset'
        init: {kwargs: {root: *root, train: True, download: True, transform: *to_tensor}}
      indices: !import_call {key: 'builtins.range', init: {args: [45000, 50000]}}
&test_set $folder/test: !import_call
  key: 'torchvision.datasets.$dataset'
  init: {kwargs: {root: *root, train: False, download: True, transform: *to_tensor}}
"""
)
GENERATED = Template(
    """\
&train_set $folder/train: !import_call
  key: 'torchdistill_adv.datasets.MixedWithGenerated'
  init: {kwargs: {original: *original, path: './resource/dataset/${folder}_ddpm.npz', generated_fraction: 0.7}}
"""
)
DIGITS_DATASETS = """\
&train_set digits/train: !import_call
  key: 'torchdistill_adv.datasets.Digits'
  init:
    kwargs:
      split: 'train'
      transform: !import_call
        key: 'torchvision.transforms.Compose'
        init:
          kwargs:
            transforms:
              - !import_call {key: 'torchvision.transforms.RandomCrop', init: {kwargs: {size: 8, padding: 1}}}
              - &to_tensor !import_call {key: 'torchvision.transforms.ToTensor'}
&val_set digits/val: !import_call
  key: 'torchdistill_adv.datasets.Digits'
  init: {kwargs: {split: 'val', transform: *to_tensor}}
&test_set digits/test: !import_call
  key: 'torchdistill_adv.datasets.Digits'
  init: {kwargs: {split: 'test', transform: *to_tensor}}
"""


def attack(num_steps: int, step_size: str, eps: str) -> dict[str, str]:
    """The searches and the threat model that the terms share."""
    steps = f"num_steps: {num_steps}, step_size: {step_size}"
    return {
        "gaussian": f"{{key: 'PGD', kwargs: {{{steps}, start: 'gaussian'}}}}",
        "uniform": f"{{key: 'PGD', kwargs: {{{steps}, start: 'uniform'}}}}",
        "num_steps": str(num_steps),
        "step_size": step_size,
        "threat": f"{{norm: 'linf', eps: {eps}, space: 'pixel', mean: [0], std: [1]}}",
    }


def cifar(num_classes: int, **values: str) -> Data:
    folder = f"cifar{num_classes}"
    return Data(
        folder,
        f"CIFAR-{num_classes}",
        num_classes,
        CIFAR_DATASETS.substitute(folder=folder, dataset=folder.upper()),
        ("num_workers: 8, pin_memory: True", "num_workers: 4, pin_memory: True"),
        attack(10, "2/255", "8/255")
        | {"fast_steps": "num_steps: 5, first_num_steps: 2, step_size: 4/255"}
        | {"begin": "60", "begin_second": "40", "pairing": "'dataset' # dataset_wrapper finds the images"}
        | values,
        "norm: 'linf', eps: 8/255, space: 'pixel', mean: [0], std: [1]",
        "2/255",
        ADAAD_RECIPE,
        "Ours, so that methods compare: the recipe of AdaAD's code for all, 200 epochs with a tenth of the rate after "
        "100 and 150; divergences averaged over images, not over classes.",
        "Ours: the last 5,000 training images are for validation, where published code selects on the test set.",
    )


OVER_CLASSES = "gives the scale of the official code, which averages over the classes too"
CIFAR10 = cifar(
    10,
    ard_weight=f"1.0 # 0.1 {OVER_CLASSES}",
    rslad_weight=f"1.0 # 0.1 {OVER_CLASSES}",
    adaad_weight=f"1.0 # 0.1 {OVER_CLASSES}",
    igdm_weight="1.0 # the official code's on CIFAR-10",
)
CIFAR100 = cifar(
    100,
    ard_weight=f"1.0 # 0.01 {OVER_CLASSES}",
    rslad_weight="1.0 # 0.1 gives the scale of the official code, which averages over the classes, times 10",
    adaad_weight="1.0",
    igdm_weight="10.0 # the official code's on CIFAR-100",
)
DIGITS = Data(
    "digits",
    "digits",
    10,
    DIGITS_DATASETS,
    ("num_workers: 0", "num_workers: 0"),
    attack(5, "0.05", "0.15")
    | {"fast_steps": "num_steps: 3, first_num_steps: 1, step_size: 0.0833"}
    | {"begin": "9", "begin_second": "6", "pairing": "'batch'"}
    | {f"{name}_weight": "1.0" for name in ("ard", "rslad", "adaad", "igdm")}
    | {"boundary": "{norm: 'l2', eps: .inf, space: 'input', mean: [0], std: [1]}"},
    "norm: 'linf', eps: 0.15, space: 'pixel', mean: [0], std: [1]",
    "0.0375",
    DIGITS_RECIPE,
    "Ours: the setting, for which there are no published numbers: 30 epochs, to which any named above are scaled; "
    "clipped gradients; for methods with a ball 0.15 around images in [0, 1], in 5 steps of 0.05.",
    "With val_data_loader: {} and robust_validation: {} the runner keeps the last epoch, which "
    "benchmarks/robust_digits.py attacks.",
    wrapped=False,
)


def with_generated(data: Data) -> Data:
    """``data`` with generated images among the training set."""
    train, rest = data.datasets.split("&val_set")
    original = train.replace(f"&train_set {data.folder}/train: !", f"{data.folder}/original: &original !")
    mixed = GENERATED.substitute(folder=data.folder)
    note = (
        f"{data.note} The generated images are an .npz file with the arrays image and label, such as the DDPM ones of "
        "https://arxiv.org/abs/2103.01946; their share is that of Wang et al., ICML 2023."
    )
    return replace(data, datasets=f"{original}{mixed}&val_set{rest}", note=note)


def normalised(data: Data, mean: str, std: str) -> Data:
    """``data`` with Normalize after ToTensor."""
    normalize = f"""\
                    - &normalize !import_call
                      key: 'torchvision.transforms.Normalize'
                      init:
                        kwargs: &normalize_kwargs {{mean: {mean}, std: {std}}}
"""
    plain = """
          kwargs:
            root: *root
            train: True
            download: True
            transform: &plain !import_call
              key: 'torchvision.transforms.Compose'
              init: {kwargs: {transforms: [*to_tensor, *normalize]}}"""
    datasets = data.datasets.replace("      indices", f"{normalize}      indices", 1)
    datasets = datasets.replace(" {kwargs: {root: *root, train: True, download: True, transform: *to_tensor}}", plain)
    datasets = datasets.replace("transform: *to_tensor", "transform: *plain")
    return replace(data, datasets=datasets, robust_threat="<<: *normalize_kwargs, norm: 'linf', eps: 8/255")


# networks


@dataclass(frozen=True)
class Network:
    """A model of the YAML.

    Args:
        slug: name in files.
        label: name in headers.
        key: of the YAML.
        options: of the YAML, with ``$num_classes``.
    """

    slug: str
    label: str
    key: str
    options: str = "num_classes: $num_classes"

    def kwargs(self, num_classes: int) -> str:
        return f"{{{Template(self.options).substitute(num_classes=num_classes)}}}"


def transformer(slug: str, label: str, name: str) -> Network:
    options = f"model_name: '{name}', img_size: 32, patch_size: 4, pretrained: False, num_classes: $num_classes"
    return Network(slug, label, "timm", options)


def torchdistill_resnet(depth: int) -> Network:
    return Network(
        f"resnet{depth}", f"ResNet-{depth}", f"resnet{depth}", "num_classes: $num_classes, pretrained: False"
    )


def small_cnn(width: int, depth: int) -> Network:
    options = f"num_classes: $num_classes, in_channels: 1, width: {width}, depth: {depth}"
    return Network("", f"CNN of width {width}", "small_cnn", options)


RESNET18 = Network("resnet18", "ResNet-18", "cifar_resnet18")
MOBILENET = Network("mobilenetv2", "MobileNetV2", "cifar_mobilenet_v2")
WRN = Network("wrn34_10", "WRN-34-10", "cifar_wide_resnet", "depth: 34, widen_factor: 10, num_classes: $num_classes")
VIT_B = transformer("vit_b", "ViT-B", "vit_base_patch16_224")
DEIT_S = transformer("deit_s", "DeiT-S", "deit_small_patch16_224")
BSS_TEACHER, BSS_STUDENT = torchdistill_resnet(56), torchdistill_resnet(20)
DIGITS_TEACHER, DIGITS_STUDENT = small_cnn(32, 4), small_cnn(8, 4)


@dataclass(frozen=True)
class Teacher:
    """A trained network.

    Args:
        network: what it is.
        preparation: for the header: where its weights are from.
        src_ckpt: checkpoint; None where the model brings its weights.
        remark: lines of comment in the YAML.
    """

    network: Network
    preparation: str
    src_ckpt: str | None = None
    remark: str = ""

    def part(self, num_classes: int) -> str:
        """The block of a part of a pair, whose parts have no ``src_ckpt``."""
        model = f"{{key: '{self.network.key}', kwargs: {self.network.kwargs(num_classes)}}}"
        return f"key: 'from_checkpoint'\nkwargs:\n  model: {model}\n  checkpoint: '{self.src_ckpt}'\n"


def trained_by(path: str, network: Network, remark: str = "", role: str = "teacher") -> Teacher:
    """What another configuration trains."""
    return Teacher(network, f"Train the {role} first, with configs/{path}.yaml.", checkpoint(path), remark)


def checkpoint(path: str) -> str:
    """Where the configuration of that path leaves its student."""
    return f"./resource/ckpt/{path}.pt"


# methods


@dataclass(frozen=True)
class Method:
    """One way to train.

    Args:
        title: name, authors and venue.
        facts: what is whose, in sentences.
        terms: YAML of the sub-terms, with ``$name`` where the data decide.
        recipe: its own on CIFAR; None is that of AdaAD.
        teachers: 0, 1, or 2 for a robust and a standard one.
        max_grad_norm: where the recipe has none.
    """

    title: str
    facts: str
    terms: str
    recipe: Recipe | None = None
    teachers: int = 1
    max_grad_norm: float | None = None


GAUSSIAN, UNIFORM = "adversary: $gaussian", "adversary: $uniform"
FAST = """\
adversary:
  key: 'PGD'
  kwargs: {$fast_steps, start: 'gaussian'}"""
SVGD = """\
adversary:
  key: 'SVGD'
  kwargs:
    num_particles: 4
    num_steps: $num_steps
    step_size: $step_size
    noise_factor: 1.0
    bandwidth: 'median'
    norm: 'linf'"""


def term(
    name: str,
    loss: str,
    *options: str,
    search: str = GAUSSIAN,
    threat: str = "$threat",
    weight: str = "1.0",
    remark: str = "",
) -> str:
    """YAML of a sub-term; ``options`` are its own lines."""
    lines = [*options, search, f"threat: {threat}"]
    kwargs = textwrap.indent("\n".join(lines), 6 * " ")
    return f"{name}:{remark}\n  criterion:\n    key: '{loss}'\n    kwargs:\n{kwargs}\n  weight: {weight}\n"


def rslad(*terms: str, search: str = GAUSSIAN) -> str:
    options = ("alpha: 5/6", "objective: 'kl_clean_teacher_student'")
    return term("rslad", "RSLADLoss", *options, search=search, weight="$rslad_weight") + "".join(terms)


def akd(search: str = GAUSSIAN) -> str:
    return term("akd", "AKDLoss", "teacher_share: 0.5", search=search)


def adaad(*terms: str, search: str = GAUSSIAN) -> str:
    options = ("alpha: 1.0 # the adversarial divergence alone", "temperature: 1.0", "objective: 'kl_teacher_student'")
    return term("adaad", "AdaADLoss", *options, search=search, weight="$adaad_weight") + "".join(terms)


def igdm(objective: str) -> str:
    return term(
        "igdm",
        "IGDMLoss",
        "ramp: True",
        f"objective: '{objective}'",
        weight="$igdm_weight",
        remark=" # the search of the term above, which is run once for both",
    )


def darwin(*options: str, iakd_weight: float = 1.0, dbkd_weight: float = 1.0, search: str = GAUSSIAN) -> str:
    weights = (f"iakd_weight: {iakd_weight}", f"dbkd_weight: {dbkd_weight}")
    triplets = ("margin: 1.0", "distance: 'kl'", *(options or ("pairing: $pairing",))) if dbkd_weight else ()
    return term(
        "darwin",
        "DARWINLoss",
        *("beta: 1.0", "gamma: 0.5", "arkd_weight: 1.0", *weights, *triplets),
        search=search,
    )


def smaraad(*options: str, matching: str = "slack", alignment: str = "attribution") -> str:
    return term(
        "smaraad",
        "SmaraADLoss",
        f"matching: '{matching}'",
        f"alignment: '{alignment}' # in the search too",
        *("offset: 1.0", "alignment_weight: 1.0", "sharpness: 2.0", *options),
        search=UNIFORM,
    )


def kd(temperature: float, alpha: float) -> str:
    return f"""\
kd:
  criterion:
    key: 'KDLoss' # alpha CE + (1 - alpha) T^2 KL, on clean images
    kwargs:
      student_module_path: '.'
      student_module_io: 'output'
      teacher_module_path: '.'
      teacher_module_io: 'output'
      temperature: {temperature}
      alpha: {alpha}
      reduction: 'batchmean'
  weight: 1.0
"""


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
# as in the hand-written configurations of TALD
TALD = """\
tald:
  criterion:
    key: 'TALDLoss'
    kwargs:
      adversary:
        key: 'SVGD'
        kwargs: {num_particles: 4, num_steps: 1, step_size: 0.1, noise_factor: 10.0, bandwidth: 'median'}
      threat: {norm: 'l2', eps: 0.3, space: 'input', mean: [0], std: [1]}
      objective: 'kl_teacher_clean_teacher'
      student_bn: 'batch'
  weight: 0.01
"""
PARTIAL_TRUST = "weigh_teacher: False # True for the idea that a teacher trusted in part counts in part"

FEWER_STEPS = (
    "Ours: the search goes as far in fewer steps, fewest in the first epochs; docs/results/combination.md has what it "
    "costs and gains on small networks."
)
TWICE = (
    "Ours: twice the epochs of AdaAD's code, which fewer steps pay for; divergences averaged over images. It is the "
    "combination of docs/results/combination.md, whose small networks have a few epochs: 400 were not run."
)

HUANG = "Huang et al., CVPR 2023"
DONG = "Dong et al., CVPR 2024"
YIN = "Yin et al., CVPR 2024"
SEARCH_IN_EVAL = "Our reading: the student is in eval mode during the search."
AKD_FACTS = (
    "The paper's, from its abstract: labels and the teacher's predictions are mixed. Our reading: half of each, a "
    "teacher on clean images, and a search on the same mixture."
)
RSLAD_FACTS = (
    "RSLAD's paper: alpha = 5/6. Its official code: a Gaussian start of deviation 0.001, and a recipe of its own (300 "
    "epochs, a tenth of the rate after 215, 260 and 285, weight decay 2e-4)."
)
ADAAD_FACTS = "AdaAD's official code: alpha = 1, both networks in the search, a Gaussian start of deviation 0.001."
IGDM_FACTS = "IGDM (Lee et al., ICLR 2025), its paper: the addition. Its official code: the weight."
DARWIN_FACTS = (
    "The paper's: the three parts, gamma = 0.5. Our reading, as there is no official code: 1 for beta, the margin and "
    "the weights of the parts; means over the path instead of sums; the divergence as distance."
)
SMARAAD_FACTS = (
    "The paper's, from its supplement: a uniform start, soft ranks and their correlation, alignment in the search too. "
    "Our reading, as the equations of its losses are not at hand: how the parts are put together, 1 for offset and "
    "weight, a sharpness of 2."
)

METHODS = {
    "ce": Method(
        "cross-entropy alone",
        "Ours: no defence at all; on CIFAR with the recipe of AdaAD's code.",
        CE,
        ADAAD_RECIPE,
        teachers=0,
    ),
    "kd": Method("KD (Hinton et al., 2015)", "Ours: distillation on clean images alone, to compare.", kd(4.0, 0.1)),
    "pgd_at": Method(
        "PGD-AT (Madry et al., ICLR 2018)",
        "AdaAD's official code: the Gaussian start of deviation 0.001; on CIFAR the schedule.",
        term("pgd_at", "PGDATLoss"),
        PGD_AT_RECIPE,
        teachers=0,
    ),
    "pgd_at_fast": Method(
        "PGD-AT (Madry et al., ICLR 2018) in fewer and longer steps",
        f"AdaAD's official code: the Gaussian start of deviation 0.001. {FEWER_STEPS}",
        term("pgd_at", "PGDATLoss", search=FAST),
        ADAAD_RECIPE,
        teachers=0,
    ),
    "trades": Method(
        "TRADES (Zhang et al., ICML 2019)",
        "The paper's: beta = 6. The official code's: the Gaussian start of deviation 0.001; on CIFAR the schedule; a "
        "radius of 0.031 and steps of 0.007, where ours are those of all methods here.",
        term("trades", "TRADESLoss", "beta: 6.0"),
        TRADES_RECIPE,
        teachers=0,
    ),
    "ard": Method(
        "ARD (Goldblum et al., AAAI 2020)",
        "The official code's: alpha = 1, temperature 30, a uniform start. " + SEARCH_IN_EVAL,
        term(
            *("ard", "ARDLoss", "alpha: 1.0 # no clean cross-entropy", "temperature: 30.0"),
            search=UNIFORM,
            weight="$ard_weight",
        ),
    ),
    "iad": Method(
        "IAD-I (Zhu et al., ICLR 2022)",
        "The official code's: beta = 0.1, temperature 1, 60 of 200 epochs before introspection, a uniform start. "
        + SEARCH_IN_EVAL,
        term(
            *("iad", "IADLoss", "variant: 'I'", "temperature: 1.0", "beta: 0.1", "begin_epoch: $begin", PARTIAL_TRUST),
            search=UNIFORM,
        ),
    ),
    "iad_ii": Method(
        "IAD-II (Zhu et al., ICLR 2022)",
        "The official code's: beta = 0.1, temperature 1, 40 of 200 epochs before introspection, a uniform start; there "
        f"both teachers are of the student's size. {SEARCH_IN_EVAL}",
        term(
            *("iad", "IADLoss", "variant: 'II'", "temperature: 1.0", "beta: 0.1", "begin_epoch: $begin_second"),
            search=UNIFORM,
        ),
        teachers=2,
    ),
    "rslad": Method("RSLAD (Zi et al., ICCV 2021)", RSLAD_FACTS, rslad()),
    "rslad_fast": Method(
        "RSLAD in fewer and longer steps (Zi et al., ICCV 2021)",
        f"{RSLAD_FACTS} {FEWER_STEPS}",
        rslad(search=FAST),
    ),
    "rslad_igdm": Method("RSLAD + IGDM", f"{RSLAD_FACTS} {IGDM_FACTS}", rslad(igdm("kl_clean_teacher_student"))),
    "akd": Method(
        "AKD (Maroto et al., 2022)",
        f"{AKD_FACTS} The AKD of AdaAD's table may be this one or AKD2.",
        akd(),
    ),
    "akd_fast": Method(
        "AKD in fewer and longer steps (Maroto et al., 2022)",
        f"{AKD_FACTS} {FEWER_STEPS}",
        akd(FAST),
    ),
    "akd_fast_long": Method(
        "AKD in fewer and longer steps and more epochs (Maroto et al., 2022)",
        f"{AKD_FACTS} {FEWER_STEPS} {TWICE}",
        akd(FAST),
        TWICE_RECIPE,
    ),
    "akd_kd_fast_long": Method(
        "AKD in fewer and longer steps and more epochs, with KD on clean images",
        f"{AKD_FACTS} {FEWER_STEPS} {TWICE} So is KD with it, for more clean accuracy and less robustness.",
        akd(FAST) + kd(1.0, 0.0),
        TWICE_RECIPE,
    ),
    "akd2": Method(
        "AKD2 (Chen et al., ICLR 2021)",
        "The official code's: the weights, temperature 2, a uniform start. Ours: no average of the student's weights.",
        term(
            *("akd2", "AKD2Loss", "robust_weight: 0.6", "standard_weight: 0.1", "temperature: 2.0"),
            search=UNIFORM,
        ),
        teachers=2,
    ),
    "adaad": Method(f"AdaAD ({HUANG})", ADAAD_FACTS, adaad()),
    "adaad_igdm": Method("AdaAD + IGDM", f"{ADAAD_FACTS} {IGDM_FACTS}", adaad(igdm("kl_teacher_student"))),
    "adaad_tald": Method(
        "AdaAD + TALD",
        f"{ADAAD_FACTS} TALD's paper (Nguyen-Duc et al., WACV 2023): K = 4 particles, L = 1 step, eta = 0.1, "
        "eps = 0.3, tau = 10, weight 0.01. Ours: the two together; the median bandwidth; TALD's radius in pixels of "
        "[0, 1], as images are not normalised here.",
        adaad(TALD),
    ),
    "adaad_eps16": Method(
        f"AdaAD with a larger search radius ({HUANG})",
        f"The paper's: a ball of 16/255 in training, with steps of 4/255. {ADAAD_FACTS}",
        adaad(),
    ),
    "adaad_fast": Method(
        f"AdaAD in fewer and longer steps ({HUANG})",
        f"{ADAAD_FACTS} Ours: the search goes as far in fewer steps, fewest in the first epochs; "
        "docs/speed_accuracy.md has what it costs and gains.",
        adaad(search=FAST),
    ),
    "adaiad": Method(
        f"AdaIAD ({HUANG})",
        "The official code's: temperature 30, beta = 0.1, 60 of 200 epochs before introspection, a Gaussian start of "
        "deviation 0.001.",
        term("adaiad", "AdaIADLoss", "temperature: 30.0", "beta: 0.1", "begin_epoch: $begin", PARTIAL_TRUST),
    ),
    "dgad": Method(
        "DGAD (Park and Min, ECCV 2024)",
        "The official code's: beta = 1, the search of AdaAD.",
        term("dgad", "DGADLoss", "beta: 1.0"),
    ),
    "gacd": Method(
        "GACD (Bai et al., 2020)",
        "The paper's, from its abstract: the teacher as anchor of a contrast, samples weighted against its errors. Our "
        "reading: everything else, so numbers are not those of the paper. Ours: clipped gradients, without which the "
        "logits explode in the first steps.",
        term("gacd", "GACDLoss", "temperature: 0.1", "ce_weight: 1.0"),
        max_grad_norm=1.0,
    ),
    "crdnd": Method(
        "CRDND (Wang et al., ICASSP 2023)",
        "The paper's, from its abstract: compensation of the teacher's errors, relations between images. Our reading: "
        "everything else, so numbers are not those of the paper.",
        term("crdnd", "CRDNDLoss", "relation_weight: 1.0", "temperature: 0.5"),
    ),
    "arkd": Method(f"ARKD, the baseline of DARWIN ({DONG})", DARWIN_FACTS, darwin(iakd_weight=0.0, dbkd_weight=0.0)),
    "arkd_iakd": Method(f"ARKD + IAKD, DARWIN without DBKD ({DONG})", DARWIN_FACTS, darwin(dbkd_weight=0.0)),
    "arkd_dbkd": Method(f"ARKD + DBKD, DARWIN without IAKD ({DONG})", DARWIN_FACTS, darwin(iakd_weight=0.0)),
    "darwin": Method(f"DARWIN ({DONG})", DARWIN_FACTS, darwin()),
    "darwin_lf": Method(
        f"DARWIN-LF, which reads no label ({DONG})",
        DARWIN_FACTS + " So is LF: the teacher's predictions stand for the labels everywhere.",
        darwin("pairing: 'batch' # by the teacher's predictions", "label_free: True"),
    ),
    "darwin_svgd": Method(
        f"DARWIN ({DONG}) with SVGD as its untargeted search",
        DARWIN_FACTS
        + " Ours: four particles an image that repel each other, as TALD's do, at about four times the cost.",
        darwin(search=SVGD),
    ),
    "smaraad": Method(f"SmaraAD ({YIN})", SMARAAD_FACTS, smaraad()),
    "smaraad_pp": Method(
        f"SmaraAD++ ({YIN})",
        SMARAAD_FACTS + " So is ++: the teacher counts as in IAD.",
        smaraad("plus_plus: True", "beta: 0.1"),
    ),
    "smaraad_kl": Method(f"SmaraAD with KL in place of slack matching ({YIN})", SMARAAD_FACTS, smaraad(matching="kl")),
    "smaraad_feature": Method(
        f"SmaraAD with features aligned in place of attribution ({YIN})",
        SMARAAD_FACTS + " So is what is aligned: the mean squared channels of the last feature map.",
        smaraad(alignment="feature"),
    ),
    "bss": Method(
        "BSS (Heo et al., AAAI 2019)",
        "The official code's: 64 base samples, temperature 3, the weights and how they shrink, 10 steps of 0.3. Our "
        "reading: samples stay in the range of real images. The aim is clean accuracy.",
        term(
            *("bss", "BSSLoss", "num_base: 64", "temperature: 3.0", "kd_weight: 3.0", "bss_weight: 2.0"),
            search="adversary: {key: 'BSS', kwargs: {num_steps: 10, step_size: 0.3}}",
            threat="$boundary",
        ),
        BSS_RECIPE,
    ),
}


# published numbers, in percent


@dataclass(frozen=True)
class Table:
    """Published numbers of configurations; a dash where there is none.

    Args:
        folder: of the configurations.
        students: the columns of ``rows``, as many numbers each as there are ``labels``.
        labels: what the numbers are.
        source: where they are from, and what is different there.
        rows: a method each.
    """

    folder: str
    students: tuple[str, ...]
    labels: tuple[str, ...]
    source: str
    rows: str

    def sentences(self) -> Iterator[tuple[str, str]]:
        """Path of each configuration, and what its header says."""
        size = len(self.labels)
        for row in self.rows.strip().splitlines():
            method, *numbers = row.split()
            for i, student in enumerate(self.students):
                values = zip(numbers[i * size : (i + 1) * size], self.labels, strict=True)
                found = ", ".join(f"{value} {label}" for value, label in values if value != "-")
                yield f"{self.folder}/{method}-{student}", f"Published, not reproduced: {found} ({self.source})."


STUDENTS = ("resnet18", "mobilenetv2")
PGD_10, PGD_20 = ("% clean", "% PGD-10", "% AutoAttack"), ("% clean", "% PGD-20", "% AutoAttack")
TABLES = (
    Table("cifar10", ("wrn34_10",), PGD_20, "in DARWIN's paper", "trades_teacher 84.92 55.34 52.55"),
    Table("cifar100", ("wrn34_10",), PGD_20, "in DARWIN's paper", "trades_teacher 60.04 31.56 27.38"),
    Table("cifar10/vit", ("vit_b",), PGD_20, "in DARWIN's paper", "pgd_at_teacher 83.98 53.10 49.66"),
    Table("cifar10/vit", ("deit_s",), PGD_20, "in DARWIN's paper", "pgd_at_teacher 82.68 52.47 49.27"),
    Table(
        "cifar10/trades",
        ("resnet18",),
        ("% AutoAttack",),
        "in the paper's abstract, with another teacher",
        "adaad_eps16 54.23",
    ),
    Table(
        "cifar100/trades",
        ("resnet18",),
        ("% AutoAttack",),
        "in the abstract of IGDM's paper, with another teacher",
        "adaad_igdm 30.32",
    ),
    Table(
        "cifar10",
        STUDENTS,
        PGD_10,
        "in AdaAD's paper",
        """
pgd_at 82.95 52.87 47.69 77.54 49.90 44.56
trades 83.00 53.18 49.21 79.80 50.51 45.67
""",
    ),
    Table(
        "cifar10/robustbench",
        STUDENTS,
        PGD_10,
        "in AdaAD's paper, with this teacher",
        """
ard    84.03 53.11 48.07 79.56 49.06 44.04
iad    84.71 54.92 49.85 83.31 52.98 47.11
rslad  83.52 53.46 48.66 81.11 51.66 46.75
akd    83.22 54.16 49.26 83.41 52.35 46.82
adaad  85.58 56.40 51.37 83.79 53.04 47.66
adaiad 85.04 58.34 52.96 84.63 54.97 49.29
""",
    ),
    Table(
        "cifar10/trades",
        STUDENTS,
        PGD_20,
        "in DARWIN's paper, whose TRADES WRN-34 has 84.92, 55.34 and 52.55",
        """
ard       82.95 52.26 49.46 82.44 51.91 48.40
iad       82.41 53.06 49.78 81.61 52.30 48.34
rslad     83.12 53.91 51.19 82.89 52.72 50.04
crdnd     83.92 52.70 49.05 82.77 52.57 49.28
gacd      82.76 53.42 50.07 82.90 52.49 49.55
darwin    84.48 55.07 52.24 84.06 53.94 51.28
darwin_lf 84.35 55.02 52.33 84.08 53.76 51.09
""",
    ),
    Table(
        "cifar100/trades",
        STUDENTS,
        PGD_20,
        "in DARWIN's paper, whose TRADES WRN-34 has 60.04, 31.56 and 27.38",
        """
ard       57.46 30.14 25.30 55.28 30.23 25.28
iad       56.38 30.61 25.51 54.26 30.46 25.50
rslad     57.23 31.08 26.62 57.31 30.48 25.89
crdnd     58.03 30.16 25.68 56.24 29.65 25.61
gacd      56.82 31.19 26.12 56.10 30.49 25.33
darwin    59.12 32.30 27.26 58.45 31.53 26.55
darwin_lf 59.04 32.18 27.13 58.41 31.44 26.58
""",
    ),
    Table(
        "cifar10/trades",
        ("resnet18",),
        PGD_20,
        "in DARWIN's ablation",
        """
arkd      83.09 53.95 50.66
arkd_iakd 82.74 54.52 -
arkd_dbkd 84.68 54.36 -
""",
    ),
    Table(
        "cifar100/trades",
        ("resnet18",),
        PGD_20,
        "in DARWIN's ablation",
        """
arkd      57.34 30.59 25.32
arkd_iakd 56.68 32.11 -
arkd_dbkd 59.23 31.53 -
""",
    ),
    Table(
        "cifar10/trades",
        ("resnet18",),
        ("% clean", "% PGD", "% AutoAttack"),
        "in the supplement's Table 2, which does not name data, student and teacher",
        """
smaraad         85.77 55.70 52.36
smaraad_feature 85.53 54.15 50.94
""",
    ),
    Table(
        "cifar10/vit",
        ("resnet18_from_vit_b",),
        PGD_20,
        "in DARWIN's paper, whose ViT-B has 83.98, 53.10 and 49.66; it does not name the data",
        """
rslad     82.33 54.89 49.74
darwin    83.75 54.80 51.42
darwin_lf - - 51.49
""",
    ),
    Table(
        "cifar10/vit",
        ("mobilenetv2_from_deit_s",),
        PGD_20,
        "in DARWIN's paper, whose DeiT-S has 82.68, 52.47 and 49.27; it does not name the data",
        """
rslad     80.86 53.91 50.18
darwin    83.02 54.46 51.19
darwin_lf - - 51.13
""",
    ),
    Table(
        "cifar10/generated",
        ("resnet18",),
        ("% clean", "% robust"),
        "in DARWIN's paper, whose teacher has 82.45 and 48.90; it names neither network nor attack",
        """
iad       82.95 53.47
darwin    84.13 55.92
darwin_lf 84.68 56.41
""",
    ),
    Table(
        "cifar100/generated",
        ("resnet18",),
        ("% clean", "% robust"),
        "in DARWIN's paper, whose teacher has 56.37 and 23.78; it names neither network nor attack",
        """
ard       56.07 26.92
darwin    58.18 28.24
darwin_lf 58.74 28.45
""",
    ),
)
PUBLISHED = dict(sentence for table in TABLES for sentence in table.sentences())


ROBUST_NOTE = (
    "Ours: after every epoch PGD-10 attacks up to 1,000 validation images. Besides the checkpoint that is best on "
    "clean ones, -best_robust.pt and -last.pt are kept; robust_validation: {} turns that off."
)


# files


def paragraph(text: str) -> str:
    """Text as comment lines."""
    text = text[0].upper() + text[1:]
    return textwrap.fill(text, 120, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False) + "\n"


def indented(text: str, depth: int) -> str:
    return textwrap.indent(text, depth * "  ")


def student_block(name: str, network: Network, num_classes: int, path: str, anchor: str) -> str:
    return f"""\
  {name}:
    key: '{network.key}'
    kwargs: {network.kwargs(num_classes)}
    src_ckpt:
    dst_ckpt: {anchor}'{checkpoint(path)}'
"""


def teacher_block(teacher: Teacher, num_classes: int, standard: Teacher | None) -> str:
    if standard is not None:
        return f"""\
  teacher_model:
    key: 'teacher_pair'
    kwargs:
      robust:
{indented(teacher.part(num_classes), 4)}      standard:
{indented(standard.part(num_classes), 4)}    src_ckpt:
"""
    source = "" if teacher.src_ckpt is None else f" '{teacher.src_ckpt}'"
    return f"""\
  teacher_model:
{indented(teacher.remark, 2)}    key: '{teacher.network.key}'
    kwargs: {teacher.network.kwargs(num_classes)}
    src_ckpt:{source}
"""


def side(name: str, wrapper: str | None, is_trained: bool) -> str:
    lines = [f"{name}:", "  forward_proc: 'forward_batch_only'"]
    lines += [] if wrapper is None else [f"  wrapper: '{wrapper}'"]
    return indented("\n".join([*lines, f"  requires_grad: {is_trained}", ""]), 1)


def render(
    path: str,
    data: Data,
    method: Method,
    student: Network,
    teacher: Teacher | None = None,
    standard: Teacher | None = None,
    *,
    recipe: Recipe | None = None,
    purpose: str = "",
) -> tuple[str, str]:
    """Path and text of a configuration."""
    title = [f"{purpose}{method.title}: {student.label}, {data.label}."]
    terms = Template(method.terms).substitute(data.values)
    is_robust = "adversary" in terms
    models = student_block("model", student, data.num_classes, path, "&student_ckpt " if is_robust else "")
    sides = side("model", "DistributedDataParallel" if data.wrapped else None, True)
    if teacher is not None:
        title = [f"{method.title}: {student.label} from {teacher.network.label}, {data.label}.", teacher.preparation]
        models = teacher_block(teacher, data.num_classes, standard) + models.replace("model:", "student_model:", 1)
        sides = side("teacher", "DataParallel" if data.wrapped else None, False) + sides.replace("model:", "student:")
    if standard is not None:
        title.append(standard.preparation)
    facts = [method.facts, "" if recipe else data.recipe_note, data.note]
    facts += [ROBUST_NOTE if is_robust else "", PUBLISHED.get(path, "")]
    recipe = recipe or data.recipe
    max_grad_norm = recipe.max_grad_norm or method.max_grad_norm
    robust = ROBUST_VALIDATION.substitute(threat=data.robust_threat, step_size=data.robust_step)
    text = SKELETON.substitute(
        title="".join(map(paragraph, title)).rstrip(),
        path=path,
        facts="".join(paragraph(fact) for fact in facts if fact).rstrip(),
        mark=MARK,
        datasets=indented(data.datasets, 1),
        models=models,
        binding=before_epochs(is_robust, teacher is not None),
        robust=robust if is_robust else "",
        epochs=recipe.epochs,
        pairs="    dataset_wrapper: {key: 'PairWithOtherClass'}\n" if "pairing: 'dataset'" in terms else "",
        batch_size=recipe.batch_size,
        workers=data.workers[0],
        test_workers=data.workers[1],
        sides=sides,
        lr=recipe.lr,
        weight_decay=f"{recipe.weight_decay:.4f}",
        clipping=f"    max_grad_norm: {max_grad_norm}\n" if max_grad_norm else "",
        milestones=list(recipe.milestones),
        terms=indented(terms, 4),
    )
    return path, text


def before_epochs(is_robust: bool, has_teacher: bool) -> str:
    """The process that binds adversarial terms, or without one what puts the teacher in eval mode."""
    if is_robust:
        return "  pre_epoch_process: 'bind_adversarial_losses'\n"
    return "  pre_epoch_process: 'eval_teacher' # torchdistill leaves it in train mode\n" if has_teacher else ""


# what goes with what

EVERYWHERE = (
    *("ard", "iad", "rslad", "akd", "adaad", "adaiad", "dgad", "darwin", "darwin_lf", "smaraad", "smaraad_pp"),
    *("gacd", "crdnd"),
)
WITH_TWO_TEACHERS = ("iad_ii", "akd2")
FAST_WITH_TEACHER = ("rslad_fast", "akd_fast", "akd_fast_long", "akd_kd_fast_long")
LADDER = ("arkd", "arkd_iakd", "arkd_dbkd")
COMBINATIONS = {
    CIFAR10.folder: (
        *("kd", "rslad_igdm", "adaad_igdm", "adaad_tald", "adaad_eps16", "adaad_fast"),
        *("darwin_svgd", "smaraad_kl", "smaraad_feature", *LADDER, *FAST_WITH_TEACHER),
    ),
    CIFAR100.folder: ("kd", "rslad_igdm", "adaad_igdm", *LADDER),
}
ON_TRANSFORMERS = ("rslad", "darwin", "darwin_lf")
ON_GENERATED = {CIFAR10.folder: ("iad", "darwin", "darwin_lf"), CIFAR100.folder: ("ard", "darwin", "darwin_lf")}
# all students there have one radius and one schedule
NOT_ON_DIGITS = ("adaad_eps16", "pgd_at_fast", *FAST_WITH_TEACHER)


def robustbench(data: Data) -> Teacher:
    name = f"Chen2021LTD_WRN34_{20 if data is CIFAR10 else 10}"
    options = f"model_name: '{name}', dataset: '{data.folder}', threat_model: 'Linf'"
    preparation = "RobustBench downloads the teacher: pip install git+https://github.com/RobustBench/robustbench.git"
    return Teacher(Network("", f"RobustBench's {name}", "robustbench", options), preparation)


def cifar_files(data: Data) -> Iterator[tuple[str, str]]:
    folder = data.folder
    published = f"""\
# for a published checkpoint of this network: key 'from_checkpoint', no src_ckpt, and kwargs
# {{model: {{key: 'cifar_wide_resnet', kwargs: {WRN.kwargs(data.num_classes)}}}, checkpoint: '<file>'}}
"""
    ours = trained_by(f"{folder}/trades_teacher-wrn34_10", WRN, published)
    standard = trained_by(f"{folder}/ce_teacher-resnet18", RESNET18, role="standard teacher")
    itself = trained_by(f"{folder}/trades-resnet18", RESNET18)

    def alone(name: str, network: Network, purpose: str = "", suffix: str = "") -> tuple[str, str]:
        path, method = f"{folder}/{name}{suffix}-{network.slug}", METHODS[name]
        return render(path, data, method, network, recipe=method.recipe, purpose=purpose)

    def taught(name: str, student: Network, teacher: Teacher, subfolder: str, at: Data = data) -> tuple[str, str]:
        path, method = f"{folder}/{subfolder}/{name}-{student.slug}", METHODS[name]
        second = standard if method.teachers == 2 else None
        return render(path, at, method, student, teacher, second, recipe=method.recipe)

    yield alone("trades", WRN, "The teacher of the folder trades, by ", "_teacher")
    yield alone("ce", RESNET18, "The standard teacher of IAD-II and AKD2, by ", "_teacher")
    for student in (RESNET18, MOBILENET):
        for name in ("pgd_at", "trades"):
            yield alone(name, student)
        for name in EVERYWHERE:
            yield taught(name, student, robustbench(data), "robustbench")
        for name in (*EVERYWHERE, *WITH_TWO_TEACHERS):
            yield taught(name, student, ours, "trades")
    if data is CIFAR10:
        yield alone("pgd_at_fast", RESNET18)
    larger = replace(data, values={**data.values, **attack(10, "4/255", "16/255")})
    for name in COMBINATIONS[folder]:
        yield taught(name, RESNET18, ours, "trades", larger if name == "adaad_eps16" else data)
    for name in ON_GENERATED[folder]:
        yield taught(name, RESNET18, itself, "generated", with_generated(data))


def vit_files() -> Iterator[tuple[str, str]]:
    facts = (
        "DARWIN's teachers are by AT-PRM (Mo et al., NeurIPS 2022); this has the schedule and the clipping of its "
        "code, but neither its masks nor its mixed images."
    )
    method = replace(METHODS["pgd_at"], facts=facts)
    for transformer, student in ((VIT_B, RESNET18), (DEIT_S, MOBILENET)):
        path = f"cifar10/vit/pgd_at_teacher-{transformer.slug}"
        pretrained = replace(transformer, options=transformer.options.replace("False", "True"))
        purpose = "The teacher of this folder, from ImageNet's weights, by "
        yield render(path, CIFAR10, method, pretrained, recipe=VIT_RECIPE, purpose=purpose)
        for name in ON_TRANSFORMERS:
            taught_path = f"cifar10/vit/{name}-{student.slug}_from_{transformer.slug}"
            yield render(taught_path, CIFAR10, METHODS[name], student, trained_by(path, transformer))


def bss_files() -> Iterator[tuple[str, str]]:
    data = normalised(CIFAR10, "[0.4914, 0.4822, 0.4465]", "[0.2023, 0.1994, 0.2010]")
    data = replace(data, values={"boundary": "{<<: *normalize_kwargs, norm: 'l2', eps: .inf, space: 'input'}"})
    bss, ce = METHODS["bss"], replace(METHODS["ce"], facts="The official code's: the recipe.")
    bss = replace(bss, facts=f"{bss.facts} {ce.facts} Ours: the networks, in place of ResNet-26 and ResNet-8.")
    path = f"cifar10/bss/ce_teacher-{BSS_TEACHER.slug}"
    yield render(path, data, ce, BSS_TEACHER, recipe=BSS_RECIPE, purpose="The teacher of BSS, by ")
    teacher = trained_by(path, BSS_TEACHER)
    yield render(f"cifar10/bss/bss-{BSS_STUDENT.slug}", data, bss, BSS_STUDENT, teacher, recipe=BSS_RECIPE)


def digits_files() -> Iterator[tuple[str, str]]:
    folder = "digits/robust"
    teacher = trained_by(f"{folder}/trades_teacher", DIGITS_TEACHER)
    standard = trained_by(f"{folder}/ce_teacher", DIGITS_TEACHER, role="standard teacher")
    yield render(
        f"{folder}/trades_teacher", DIGITS, METHODS["trades"], DIGITS_TEACHER, purpose="The teacher of this folder, by "
    )
    yield render(
        f"{folder}/ce_teacher",
        DIGITS,
        METHODS["ce"],
        DIGITS_TEACHER,
        purpose="The standard teacher of this folder, by ",
    )
    for name, method in METHODS.items():
        if name not in NOT_ON_DIGITS:
            teachers = (teacher, standard)[: method.teachers]
            yield render(f"{folder}/{name}", DIGITS, method, DIGITS_STUDENT, *teachers)


def configurations() -> dict[str, str]:
    """Every file: its text by its path below ``configs/``, without the extension."""
    return dict([*cifar_files(CIFAR10), *cifar_files(CIFAR100), *vit_files(), *bss_files(), *digits_files()])


def main() -> int:
    """Write or check the files.

    Returns:
        The exit code: 1 if a check found differences.
    """
    parser = argparse.ArgumentParser(description="Write the configurations of the robust family")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file is not what it should be")
    check = parser.parse_args().check
    wanted = {ROOT / f"{path}.yaml": text for path, text in configurations().items()}
    present = {path: path.read_text() for path in ROOT.rglob("*.yaml")}
    ours = {path: text for path, text in present.items() if MARK in text}
    different = sorted(path for path in wanted.keys() | ours.keys() if wanted.get(path) != present.get(path))
    for path in different:
        print(path.relative_to(ROOT))
        if check:
            continue
        if path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path])
        else:
            path.unlink()
    return int(check and bool(different))


if __name__ == "__main__":
    sys.exit(main())
