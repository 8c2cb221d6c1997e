"""Names are imported lazily: each step of a new process imports only the optional packages that it needs."""

import ast
import json
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import lightning_bn
from lightning_bn import plots

OPTIONAL = {"lightning", "pytorch_lightning", "lightning_utilities", "lightning_fabric", "torchmetrics"}
OPTIONAL |= {"matplotlib", "wandb", "greenlet", "psutil", "tqdm"}
"""Packages that are slow to import, or that few users need."""

PLAIN = {
    "torch": "import torch; sys.modules.pop('tqdm', None)  # which torch has imported for itself",
    "lightning_bn": "import lightning_bn as lbn",
    "plain functions": """
net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).train()
batches = [torch.randn(32, 3, 5, 5) for _ in range(4)]
lbn.precise_bn(net, batches)
for change in (lbn.freeze_bn, lbn.mini_batch_inference, lambda net: lbn.ghost_bn(net, size=4), lbn.sync_bn):
    handle = change(net)
    net(batches[0])
    handle.undo()
lbn.batch_leakage(net, batches)
lbn.adapt_bn, lbn.domain_bn, lbn.roi_shuffle, lbn.exchange_rows, lbn.restore_rows, lbn.find_bn, lbn.Moments
""",
    "population": "lbn.precise_bn(net, batches, normalization_batch_size='population', memory_limit=10**9)",
    "progress": "lbn.precise_bn(net, batches, progress=True)",
    "metrics": "lbn.MeanGap",
}
CALLBACK = lightning_bn.GhostBNCallback(size=4)
WITH_LIGHTNING = {
    "Lightning": "import lightning.pytorch as L",
    "pickle": f"import pickle; assert pickle.loads({pickle.dumps(CALLBACK)!r}).size == 4",
    "command line": """
from jsonargparse import ArgumentParser
parser = ArgumentParser(exit_on_error=False)
parser.add_argument("--callback", type=L.Callback)
config = parser.parse_args(["--callback=lightning_bn.PreciseBNCallback", "--callback.num_samples=8"])
assert type(parser.instantiate(config).callback).__name__ == "PreciseBNCallback"
""",
    "callbacks": """
import lightning_bn as lbn
for name in lbn.__all__:
    getattr(lbn, name)
lbn.plots.any_logs([])
""",
    "a figure": "lbn.plots.gap_heatmap([1], layers=['bn'], gaps=[[0.5]])",
}


def modules_of(steps: dict[str, str]) -> dict[str, set[str]]:
    """The modules that each step of a new Python process imports."""
    program = """
import json, sys
imported, found, scope = set(sys.modules), {}, {'sys': sys}
for name, step in json.loads(sys.argv[1]).items():
    exec(step, scope)
    found[name], imported = sorted(set(sys.modules) - imported), set(sys.modules)
print("\\n" + json.dumps(found))
"""
    output = subprocess.check_output([sys.executable, "-c", program, json.dumps(steps)], text=True, timeout=240)
    return {name: set(modules) for name, modules in json.loads(output.splitlines()[-1]).items()}


def optional(modules: set[str]) -> set[str]:
    return OPTIONAL & {module.partition(".")[0] for module in modules}


def test_a_plain_function_imports_what_it_needs() -> None:
    found = modules_of(PLAIN)
    assert found["lightning_bn"] == {"lightning_bn", "lightning_bn.lazy"}
    assert optional(found["plain functions"]) == set()
    assert optional(found["population"]) == {"greenlet", "psutil"}  # it asks how much memory is free
    assert optional(found["progress"]) == {"tqdm"}
    assert "torchmetrics" in optional(found["metrics"]) and "lightning" not in optional(found["metrics"])


def test_a_callback_imports_lightning_but_neither_matplotlib_nor_wandb() -> None:
    found = modules_of(WITH_LIGHTNING)  # torchmetrics imports matplotlib for itself, and Lightning torchmetrics
    assert {module for module in found["pickle"] if module.startswith("lightning_bn.plots")} == set()
    of_callbacks = found["pickle"] | found["command line"] | found["callbacks"]
    assert "lightning_bn.callbacks.bn_stats_monitor" in of_callbacks
    assert not optional(of_callbacks) & {"matplotlib", "wandb", "greenlet", "psutil"}
    assert "matplotlib" in optional(found["a figure"]) and "wandb" not in optional(found["a figure"])


@pytest.mark.parametrize("package", [lightning_bn, plots], ids=lambda package: package.__name__)
def test_people_and_type_checkers_have_the_same_names_and_another_is_an_error(package: ModuleType) -> None:
    tree = ast.parse(Path(str(package.__file__)).read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {name.name: node.module for node in checked.body if isinstance(node, ast.ImportFrom) for name in node.names}
    assert sorted(seen) == sorted(package.__all__)
    for name, module in seen.items():
        assert getattr(package, name) is getattr(import_module(str(module)), name)
    public = {name for name, value in vars(package).items() if not (name[0] == "_" or isinstance(value, ModuleType))}
    assert public - {"TYPE_CHECKING", "lazily"} <= set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'precise'"):
        _ = package.precise
    with pytest.raises(ImportError, match="cannot import name 'precise'"):
        exec(f"from {package.__name__} import precise")
