"""TorchX's scheduler `local_cwd`, whose dry runs leave no folder."""

import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

from torchx.schedulers.api import AppDryRunInfo
from torchx.schedulers.local_scheduler import CWDImageProvider, LocalOpts, LocalScheduler, PopenRequest


class LocalCwdScheduler(LocalScheduler):
    """Processes of this machine, in the current folder.

    TorchX makes a temporary folder for logs in every dry run and removes the last one only. Here a folder is
    named in a dry run, made when a job starts, and removed when the scheduler is closed.
    """

    def __init__(self, session_name: str, **settings: Any) -> None:
        super().__init__(session_name, image_provider_class=CWDImageProvider, **settings)
        self._made: list[Path] = []

    def _get_app_log_dir(self, app_id: str, cfg: LocalOpts) -> str:
        given = cfg.get("log_dir")
        base = Path(given) if given else Path(tempfile.gettempdir()) / f"torchx_{uuid.uuid4().hex}"
        return str(base / self.session_name / app_id)

    def schedule(self, dryrun_info: AppDryRunInfo[PopenRequest]) -> str:
        """Start a job."""
        if not (dryrun_info._cfg or {}).get("log_dir"):
            folder = Path(dryrun_info.request.log_dir).parents[1]
            folder.mkdir(mode=0o700)
            self._made.append(folder)
        app_id: str = super().schedule(dryrun_info)
        return app_id

    def close(self) -> None:
        """End the jobs that still run, and remove the temporary folders of logs."""
        super().close()
        for folder in self._made:
            shutil.rmtree(folder, ignore_errors=True)


def create_scheduler(session_name: str, **settings: Any) -> LocalCwdScheduler:
    """What TorchX calls for `-s local_cwd`; `settings` are those of its own scheduler."""
    known = {name: settings[name] for name in ("cache_size", "extra_paths") if name in settings}
    return LocalCwdScheduler(session_name, **known)
