"""Selects the implementation of an op, by name or by the platform to compile for.

Each op owns one `Operation`. An implementation registers under a name, together with the platforms
that it is written for. A call without a name tries the implementations for the current platform:
first those for the fewest platforms, then those that run anywhere. If an implementation raises
`NotImplementedError` for a shape or a chip that it does not support, the call tries the next one. A
call with a name runs the named implementation; errors of that implementation reach the caller.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from jexit.errors import UserError

ANYWHERE = ("cpu", "gpu", "tpu")
ONLY_BY_NAME = ()
WRONG_PLATFORM = (
    "this kernel is for {} (and interpreted on CPUs), not for {}; leave out implementation=, so "
    "that the platform decides"
)


class Target(NamedTuple):
    """The compilation target: a platform, and the chip's name in JAX, such as `TPU v5 lite`."""

    platform: str
    device_kind: str


_TARGET: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


def target() -> Target:
    """Returns the target set by `compiling_for`, or else the first device of this process."""
    chosen = _TARGET.get()
    if chosen is not None:
        return chosen
    return Target(jax.default_backend(), jax.local_devices()[0].device_kind)


@contextlib.contextmanager
def compiling_for(platform: str, device_kind: str) -> Iterator[None]:
    """Selects implementations and tile sizes for a chip that need not be present.

    `device_kind` is the chip's name in JAX, such as `TPU v5 lite`. Functions traced inside this
    context can be compiled ahead of time for the chip. JAX caches traces by function and shapes,
    not by chip: if a function was traced before, call `jax.clear_caches()` first.
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
    """Sets the implementation for all op calls in this context that do not name one.

    For example, `xla` avoids a kernel that fails. The default, `auto`, chooses by platform.
    JAX caches traces: if a function was traced before, call `jax.clear_caches()` first.
    """
    token = _PREFERRED.set(implementation)
    try:
        yield
    finally:
        _PREFERRED.reset(token)


class Implementation(NamedTuple):
    """An implementation of an op, and the platforms on which calls without a name may use it."""

    function: Callable[..., Any]
    platforms: tuple[str, ...]


class Operation:
    """An op with several named implementations, which all take the same arguments."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._implementations: dict[str, Implementation] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The values that a call accepts as `implementation`, in order of registration."""
        return tuple(self._implementations)

    def register(
        self, name: str, function: Callable[..., Any], *, platforms: tuple[str, ...] = ANYWHERE
    ) -> None:
        """Registers `function` as an implementation of this op.

        Args:
          name: the value of `implementation` that selects this function in a call.
          function: takes the op's arguments; raises `NotImplementedError` for unsupported ones.
          platforms: the platforms on which calls that name no implementation may use this function.
            The fewer the platforms, the earlier it is tried.
        """
        assert name not in self._implementations, f"{self.name} already has {name}"
        self._implementations[name] = Implementation(function, platforms)

    def candidates(self, platform: str) -> tuple[str, ...]:
        """Returns the implementations that a call without a name tries on `platform`, in order.

        Implementations for the fewest platforms come first.
        """
        fitting = [
            (len(implementation.platforms), name)
            for name, implementation in self._implementations.items()
            if platform in implementation.platforms
        ]
        return tuple(name for _, name in sorted(fitting, key=lambda pair: pair[0]))

    def __call__(self, implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        """Runs the named implementation or, without a name, the first that supports the call.

        If `implementation` is None, the name set by `using`, if any, applies.

        Raises:
          UserError: if no implementation with this name is registered.
          NotImplementedError: if the named implementation (without a name: every one that is tried)
            does not support the call.
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
            f"no implementation of {self.name} supports this call on {platform} "
            f"({'; '.join(refusals) or 'none is registered for this platform'}); change the call, "
            "or run it on another platform"
        )
