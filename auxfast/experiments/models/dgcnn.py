"""DGCNN for part segmentation: the student of the paper's point clouds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from auxfast.experiments.models.layers import Activation, Norm, block, point_layers


class DGCNN(nn.Module):
    """The part segmentation network of DGCNN (Wang et al., 2019, figure 3) without the object's label as an input
    (paper, appendix C.9): (batch, 3, points) to (batch, parts + auxiliary, points), main logits first.

    Points are turned by a matrix that a small network of its own predicts. Three layers follow that see each point
    beside its nearest neighbours, found anew by the features that each layer starts from. With 50 parts and no
    auxiliary there are 1,442,875 parameters.

    Args:
        parts: outputs of the main head for each point.
        auxiliary: outputs of a second head on the same features, such as learned auxiliary labels; 0 for none.
        neighbours: number of nearest points, each point itself among them.
        width: channels of the first layer, in units of which most others are.
        embedding: channels of what describes the shape as a whole.
        dropout: share of the channels that each head drops while it is trained, twice.
        norm, activation: see `Norm` and `Activation`.

    Attributes:
        backbone: the parameters that both heads share.
        main, auxiliary: the heads; the second is None if there is none.

    Raises:
        ValueError: an unknown `norm` or `activation`; when called, fewer points than neighbours.
    """

    def __init__(
        self,
        parts: int,
        auxiliary: int = 0,
        *,
        neighbours: int = 20,
        width: int = 64,
        embedding: int = 1024,
        dropout: float = 0.5,
        norm: Norm = "batch",
        activation: Activation = "leaky_relu",
    ) -> None:
        super().__init__()
        self.backbone = _PointFeatures(neighbours, width, embedding, norm, activation)

        def head(outputs: int) -> nn.Sequential:
            return nn.Sequential(
                point_layers([embedding + 3 * width, 4 * width], norm, activation),
                nn.Dropout(dropout),
                point_layers([4 * width, 4 * width], norm, activation),
                nn.Dropout(dropout),
                point_layers([4 * width, 2 * width], norm, activation),
                nn.Conv1d(2 * width, outputs, 1),
            )

        self.main = head(parts)
        self.auxiliary = head(auxiliary) if auxiliary else None

    def forward(self, points: Tensor) -> Tensor:
        features = self.backbone(points)
        main: Tensor = self.main(features)
        return main if self.auxiliary is None else torch.cat([main, self.auxiliary(features)], dim=1)


class _PointFeatures(nn.Module):
    """(batch, 3, points) to (batch, embedding + 3 width, points): what describes the shape, and the features of each
    point after each of the three layers."""

    def __init__(self, neighbours: int, width: int, embedding: int, norm: Norm, activation: Activation) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.transform = _Transform(width, embedding, norm, activation)
        self.edges = nn.ModuleList(
            [
                point_layers([6, width, width], norm, activation, nn.Conv2d),
                point_layers([2 * width, width, width], norm, activation, nn.Conv2d),
                point_layers([2 * width, width], norm, activation, nn.Conv2d),
            ]
        )
        self.shape = point_layers([3 * width, embedding], norm, activation)

    def forward(self, points: Tensor) -> Tensor:
        if points.dim() != 3 or points.shape[1] != 3 or points.shape[2] < self.neighbours:
            raise ValueError(
                f"points: got shape {tuple(points.shape)}, must be (batch, 3, points), with at least {self.neighbours} "
                "points, the number of neighbours"
            )
        x = self.transform(_edges(points, self.neighbours)) @ points
        local = []
        for layers in self.edges:
            x = layers(_edges(x, self.neighbours)).max(dim=3).values
            local.append(x)
        shape = self.shape(torch.cat(local, dim=1)).max(dim=2, keepdim=True).values
        return torch.cat([shape.expand(-1, -1, points.shape[2]), *local], dim=1)


class _Transform(nn.Module):
    """(batch, 6, points, neighbours), edges, to matrices (batch, 3, 3), the identity at first."""

    def __init__(self, width: int, embedding: int, norm: Norm, activation: Activation) -> None:
        super().__init__()
        self.edges = point_layers([6, width, 2 * width], norm, activation, nn.Conv2d)
        self.shape = point_layers([2 * width, embedding], norm, activation)
        bias = norm != "batch"
        self.matrix = nn.Sequential(
            *block(nn.Linear(embedding, 8 * width, bias=bias), norm, activation),
            *block(nn.Linear(8 * width, 4 * width, bias=bias), norm, activation),
            nn.Linear(4 * width, 9),
        )
        last = self.matrix[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(torch.eye(3).flatten())

    def forward(self, edges: Tensor) -> Tensor:
        shape = self.shape(self.edges(edges).max(dim=3).values).max(dim=2).values
        matrices: Tensor = self.matrix(shape)
        return matrices.view(-1, 3, 3)


def _edges(x: Tensor, neighbours: int) -> Tensor:
    """(batch, channels, points) to (batch, 2 channels, points, neighbours): from each point the way to each of its
    nearest points, and the point itself (Wang et al., 2019, equation 8)."""
    batch, channels, points = x.shape
    with torch.no_grad():
        rows = x.transpose(1, 2)
        nearest = torch.cdist(rows, rows).topk(neighbours, dim=2, largest=False).indices
    columns = nearest.flatten(1).unsqueeze(1).expand(-1, channels, -1)
    near = x.gather(2, columns).view(batch, channels, points, neighbours)
    here = x.unsqueeze(3).expand_as(near)
    return torch.cat([near - here, here], dim=1)
