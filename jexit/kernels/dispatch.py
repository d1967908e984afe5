"""Choice of an implementation: by name, or by the platform that the computation is for.

Each op owns one `Operation`. An implementation registers under a name and, if it is written for
some platforms only, with those. No name picks for the platform at hand: what was registered for it
first, then what runs anywhere, and one that raises `NotImplementedError` (a shape or a chip that it
does not cover) hands over to the next. A name runs that implementation or raises.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from jexit.errors import UserError

ANYWHERE = ("cpu", "gpu", "tpu")
ONLY_BY_NAME = ()


class Target(NamedTuple):
    """What is compiled for: a platform and JAX's name of the chip, such as `TPU v5 lite`."""

    platform: str
    device_kind: str


_TARGET: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


def target() -> Target:
    """The chip of `compiling_for`, else the first device that this process has."""
    chosen = _TARGET.get()
    if chosen is not None:
        return chosen
    return Target(jax.default_backend(), jax.local_devices()[0].device_kind)


@contextlib.contextmanager
def compiling_for(platform: str, device_kind: str) -> Iterator[None]:
    """Picks implementations and tile sizes for a chip that this process need not have.

    For compiling ahead of time: what is traced inside is for that chip. JAX remembers traces by
    function and shapes, not by chip: a function that was traced outside needs
    `jax.clear_caches()` first.
    """
    token = _TARGET.set(Target(platform, device_kind))
    try:
        yield
    finally:
        _TARGET.reset(token)


AUTO = "auto"
_PREFERRED: contextvars.ContextVar[str] = contextvars.ContextVar("preferred", default=AUTO)


@contextlib.contextmanager
def using(implementation: str) -> Iterator[None]:
    """Runs that implementation in calls that name none: `xla` where a kernel fails on a chip.

    `auto` leaves the choice to the platform. As with `compiling_for`, a function that was traced
    before needs `jax.clear_caches()`.
    """
    token = _PREFERRED.set(implementation)
    try:
        yield
    finally:
        _PREFERRED.reset(token)


class Implementation(NamedTuple):
    """One way to compute an op, and the platforms on which it may be picked unnamed."""

    function: Callable[..., Any]
    platforms: tuple[str, ...]


class Operation:
    """An op with several implementations that take the same arguments."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._implementations: dict[str, Implementation] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names that `implementation=` may take, in order of registration."""
        return tuple(self._implementations)

    def register(
        self, name: str, function: Callable[..., Any], *, platforms: tuple[str, ...] = ANYWHERE
    ) -> None:
        """Adds an implementation.

        Args:
          name: what `implementation=` calls it.
          function: takes the op's arguments; raises `NotImplementedError` for what it does not
            cover.
          platforms: where it may be picked unnamed; fewer platforms mean a more special
            implementation, which goes first.
        """
        assert name not in self._implementations, f"{self.name} already has {name}"
        self._implementations[name] = Implementation(function, platforms)

    def candidates(self, platform: str) -> tuple[str, ...]:
        """Names that an unnamed call tries on `platform`, the most special first."""
        fitting = [
            (len(implementation.platforms), name)
            for name, implementation in self._implementations.items()
            if platform in implementation.platforms
        ]
        return tuple(name for _, name in sorted(fitting, key=lambda pair: pair[0]))

    def __call__(self, implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        """Runs the op.

        Raises:
          ValueError: for a name that was never registered.
          NotImplementedError: from the named implementation, or when none covers the call.
        """
        implementation = implementation or _PREFERRED.get()
        if implementation != AUTO:
            if implementation not in self._implementations:
                raise UserError(
                    f"{self.name} has no implementation {implementation!r}; use None or one of "
                    f"{', '.join(self.names)}"
                )
            return self._implementations[implementation].function(*args, **kwargs)
        refusals, platform = [], target().platform
        for name in self.candidates(platform):
            try:
                return self._implementations[name].function(*args, **kwargs)
            except NotImplementedError as error:
                refusals.append(f"{name}: {error}")
        raise NotImplementedError(
            f"No implementation of {self.name} covers this call on {platform} "
            f"({'; '.join(refusals) or 'none is registered for it'})"
        )
