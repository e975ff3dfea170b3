"""KN in any network: the beliefs are threaded through the graph that torch.fx traces."""

from .convert import convert_kalman_norm
from .network import KalmanNetwork

__all__ = ["KalmanNetwork", "convert_kalman_norm"]
