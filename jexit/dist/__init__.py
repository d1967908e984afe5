"""The device mesh, the rules that shard arrays over it, and communication between hosts."""

from jexit.dist.mesh import (
    HostRows,
    data_shards,
    fetch_rows,
    gathered_width,
    host_rows,
    make_mesh,
    place_parameter,
    place_parameters,
    place_rows,
    provide_threads,
    use_mesh,
)
from jexit.dist.multihost import (
    arrays_from_primary,
    barrier,
    from_primary,
    gather,
    is_primary,
    several_hosts,
    waiting,
    whole,
)
from jexit.dist.rules import constrain, constrain_parameters, data_axes
