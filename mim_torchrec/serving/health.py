"""Whether the server is ready, found out within a bound: every store is asked, by a thread of its own."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from mim_torchrec.serving.service import Served, Service

PATIENCE = 1.0  # seconds; probes of Kubernetes wait one second by default


class Health:
    """Asks what is served.

    Args:
        service: to ask.
        patience: seconds that an answer takes at most.
    """

    def __init__(self, service: Service, patience: float = PATIENCE) -> None:
        self._service, self._patience = service, patience
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="health")
        self._asking: tuple[Served, asyncio.Future[str | None]] | None = None

    async def problem(self) -> str | None:
        """Why no scores can be given, or why vectors are not kept up; None where all is well.

        Those who ask at the same time share one answer, so that a store that hangs holds up one thread.
        """
        served = self._service.current
        if self._asking is None or self._asking[0] is not served or self._asking[1].done():
            loop = asyncio.get_running_loop()
            self._asking = served, loop.run_in_executor(self._pool, served.find_problem)
        asked = self._asking[1]
        done, _ = await asyncio.wait({asked}, timeout=self._patience)
        if not done:
            return f"the stores have not answered within {self._patience:g} s"
        return asked.result()

    def close(self) -> None:
        """Ask nothing any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
