"""Choice of an op's implementation, by name or by the platform that the computation is for.

Each op owns one `Operation`. An implementation registers under a name and, if it is written for
some platforms only, with those platforms. A call without a name tries the implementations for the
current platform: first those for the fewest platforms, then those that run anywhere. If an
implementation raises `NotImplementedError` for a shape or a chip that it does not support, the call
tries the next implementation. A call with a name runs the named implementation or raises that
implementation's error.
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
    """The compilation target: a platform, and the chip's name in JAX, such as `TPU v5 lite`."""

    platform: str
    device_kind: str


_TARGET: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


def target() -> Target:
    """Returns the target that `compiling_for` has set, or else this process's first device."""
    chosen = _TARGET.get()
    if chosen is not None:
        return chosen
    return Target(jax.default_backend(), jax.local_devices()[0].device_kind)


@contextlib.contextmanager
def compiling_for(platform: str, device_kind: str) -> Iterator[None]:
    """Chooses implementations and tile sizes for a chip that this process need not have.

    `device_kind` is the chip's name in JAX, such as `TPU v5 lite`. Functions traced inside this
    context can be compiled ahead of time for the chip. JAX caches traces by function and shapes,
    not by chip: if a function was traced outside before, call `jax.clear_caches()` first.
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
    """Makes op calls that name no implementation run `implementation` while the context is active.

    An example is `xla` on a chip where a kernel fails. The default, `auto`, chooses by the
    platform. JAX caches traces: if a function was traced before, call `jax.clear_caches()` first.
    """
    token = _PREFERRED.set(implementation)
    try:
        yield
    finally:
        _PREFERRED.reset(token)


class Implementation(NamedTuple):
    """One way to compute an op, and the platforms on which it may be chosen without being named."""

    function: Callable[..., Any]
    platforms: tuple[str, ...]


class Operation:
    """An op with several named implementations, all of which take the same arguments."""

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
        """Adds an implementation.

        Args:
          name: the value of `implementation` that selects this function in a call.
          function: takes the op's arguments, and raises `NotImplementedError` for arguments that it
            does not support.
          platforms: the platforms on which a call that names no implementation may choose this
            function. The fewer the platforms, the earlier the function is tried.
        """
        assert name not in self._implementations, f"{self.name} already has {name}"
        self._implementations[name] = Implementation(function, platforms)

    def candidates(self, platform: str) -> tuple[str, ...]:
        """Returns the names to try on `platform`, in order, if a call names no implementation.

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

        Raises:
          UserError: if no implementation with this name is registered.
          NotImplementedError: if the named implementation does not support the call or, without a
            name, if no implementation supports the call.
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
            f"No implementation of {self.name} supports this call on {platform} "
            f"({'; '.join(refusals) or 'none is registered for this platform'})"
        )
