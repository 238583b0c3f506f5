"""Networks of the paper's experiments, one a module, on plain torch.

The networks of images, without `classes`, give features: (batch, num_features), by an attribute of that name. All have
second derivatives, and the smooth variants of the paper's appendix D.
"""

from auxfast.experiments.models.convnet import ConvNet
from auxfast.experiments.models.dgcnn import DGCNN
from auxfast.experiments.models.heads import TwoHeads
from auxfast.experiments.models.layers import Activation, Norm
from auxfast.experiments.models.pointnet import PointNet
from auxfast.experiments.models.resnet import ResNet8, ResNet18, load_resnet18
from auxfast.experiments.models.segnet import SegNet
from auxfast.experiments.models.vgg import VGG16

__all__ = [
    "DGCNN",
    "VGG16",
    "Activation",
    "ConvNet",
    "Norm",
    "PointNet",
    "ResNet8",
    "ResNet18",
    "SegNet",
    "TwoHeads",
    "load_resnet18",
]
