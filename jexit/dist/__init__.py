"""Where arrays lie on many devices: the mesh, and the rules from logical axes to its axes."""

from jexit.dist.mesh import make_mesh, place_parameter, place_parameters, place_rows, use_mesh
from jexit.dist.rules import constrain, constrain_parameters

__all__ = [
    "constrain",
    "constrain_parameters",
    "make_mesh",
    "place_parameter",
    "place_parameters",
    "place_rows",
    "use_mesh",
]
