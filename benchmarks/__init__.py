"""Programs that measure: `python -m mim_torchrec.benchmarks.<room>.<program>`, or `torchx run mim.bench`."""

import importlib.util

for _name in ("jinja2", "matplotlib"):
    if importlib.util.find_spec(_name) is None:
        raise ModuleNotFoundError(
            f"the benchmarks need {_name}, which is not installed: pip install 'mim-torchrec[report]'",
            name=_name,
        )
