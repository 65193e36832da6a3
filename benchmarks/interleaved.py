"""Functions timed in turns, so that what else the machine does falls on all of them."""

import time
from collections.abc import Callable

LEAST_ROUNDS = 5

Function = Callable[[], object]


def interleaved(
    functions: dict[str, Function], seconds: float, clock: Callable[[], float] = time.perf_counter, warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of one call, in as many rounds as fit (but not too few), in which every function has its turn.

    Every other round goes backwards: a function finds the caches as the one before it left them.

    With ``warm``, each turn begins with a call that is not timed, so that the caches hold what the function uses.
    """
    calls = {}
    for name, function in functions.items():
        function()
        start = time.perf_counter()
        function()
        calls[name] = max(1, int(2e-3 / (time.perf_counter() - start)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    turns = list(functions.items())
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(samples.values()))) < LEAST_ROUNDS:
        turns = turns[::-1]
        for name, function in turns:
            if warm:
                function()
            start = clock()
            for _ in range(calls[name]):
                function()
            samples[name].append((clock() - start) / calls[name])
    return samples
