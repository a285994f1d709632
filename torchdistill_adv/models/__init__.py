"""Models for torchdistill's YAML that it does not have itself; importing this registers them."""

from torchdistill_adv.models.checkpoint import from_checkpoint
from torchdistill_adv.models.mobilenet import cifar_mobilenet_v2, cifar_mobilenet_v2_half
from torchdistill_adv.models.resnet import cifar_resnet8x4, cifar_resnet18, cifar_resnet32x4, cifar_resnet50
from torchdistill_adv.models.robustbench import robustbench
from torchdistill_adv.models.shufflenet import cifar_shufflenet_v1, cifar_shufflenet_v2
from torchdistill_adv.models.small_cnn import SmallCNN
from torchdistill_adv.models.teacher_pair import TeacherPair
from torchdistill_adv.models.timm import timm
from torchdistill_adv.models.vgg import cifar_vgg8, cifar_vgg13
from torchdistill_adv.models.wide_resnet import cifar_wide_resnet

__all__ = [
    "SmallCNN",
    "TeacherPair",
    "cifar_mobilenet_v2",
    "cifar_mobilenet_v2_half",
    "cifar_resnet8x4",
    "cifar_resnet18",
    "cifar_resnet32x4",
    "cifar_resnet50",
    "cifar_shufflenet_v1",
    "cifar_shufflenet_v2",
    "cifar_vgg8",
    "cifar_vgg13",
    "cifar_wide_resnet",
    "from_checkpoint",
    "robustbench",
    "timm",
]
