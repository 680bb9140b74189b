"""Streams and events of the pretended GPU: one stream computes, and all others are one beside it."""

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mim_torchrec.benchmarks.rehearsal.counts import Counts

MEMORY = 80 << 30
NUM_GPUS = 8


def cuda_functions(counts: Counts, device: torch.device) -> dict[str, Any]:
    """What `torch.cuda` has on the pretended GPU, by name."""

    class Event:
        """A moment in what was launched on a stream."""

        def __init__(self, *_: Any, **__: Any) -> None:
            self._aside, self._launched = 0, 0

        def record(self, *_: Any) -> None:
            self._aside, self._launched = counts.aside, counts.launched[counts.aside]

        def wait(self, *_: Any) -> None:
            pass

        def query(self) -> bool:
            return self._launched <= counts.done[self._aside]

        def synchronize(self) -> None:
            counts.sync("event", self._launched, self._aside)

        def elapsed_time(self, _: Any) -> float:
            return 0.0

    class Stream:
        """The one that computes, or another."""

        device_index, cuda_stream, stream_id, device_type = device.index, 0, 0, 1

        def __init__(self, *_: Any, **__: Any) -> None:
            self.device, self.aside = device, 1

        def wait_stream(self, _: Any) -> None:
            pass

        def wait_event(self, _: Any) -> None:
            pass

        def record_event(self, event: Any = None) -> Any:
            event = event or Event()
            event.record()
            return event

        def synchronize(self) -> None:
            counts.sync("stream", aside=self.aside)

        def query(self) -> bool:
            return counts.launched[self.aside] <= counts.done[self.aside]

        def is_capturing(self) -> bool:
            return False

    main, beside = Stream(), Stream()
    main.aside = 0

    @contextlib.contextmanager
    def stream(taken: Any) -> Iterator[None]:
        before = counts.aside
        if taken is not None:
            counts.aside = taken.aside
        try:
            yield
        finally:
            counts.aside = before

    def gives(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    properties = types.SimpleNamespace(
        major=9,
        minor=0,
        name="pretended GPU",
        total_memory=MEMORY,
        multi_processor_count=132,
        uuid=device.index,
    )
    return {
        "Event": Event,
        "Stream": Stream,
        "stream": stream,
        "current_stream": lambda *_: beside if counts.aside else main,
        "default_stream": gives(main),
        "synchronize": lambda *_: counts.sync("synchronize", aside=0),
        "is_available": gives(True),
        "is_initialized": gives(True),
        "_lazy_init": gives(None),
        "device_count": gives(NUM_GPUS),
        "current_device": gives(device.index),
        "set_device": gives(None),
        "get_device_name": gives(properties.name),
        "get_device_capability": gives((properties.major, properties.minor)),
        "get_device_properties": gives(properties),
        "is_bf16_supported": gives(True),
        "is_current_stream_capturing": gives(False),
        "mem_get_info": gives((MEMORY * 7 // 8, MEMORY)),
        "memory_allocated": gives(0),
        "max_memory_allocated": gives(0),
        "reset_peak_memory_stats": gives(None),
        "empty_cache": gives(None),
        "manual_seed": gives(None),
        "manual_seed_all": gives(None),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": gives(None),
    }
