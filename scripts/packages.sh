#!/usr/bin/env bash
# Installs the package every way a user may, into fresh environments, and runs it there. By hand: it needs the network.
#
#     bash scripts/packages.sh [python ...]     # each a Python 3.11 or newer; its environments go to out/packages
#
# TORCH="torch==2.13.0" is what is installed first. VENV=folder takes an environment that has a torch in place of a new
# one, and installs into it.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=$PWD/out/packages
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PIP_DISABLE_PIP_VERSION_CHECK=1

SMOKE='
import sys, tempfile, warnings, torch
from pathlib import Path
sys.path.pop(0)  # the installed package, not the checkout
import dss_fast
assert "site-packages" in dss_fast.__file__, dss_fast.__file__
from dss_fast import Flow, Solver, Target, sample, search
from dss_fast.step import backends
target = Target(lambda x, t: torch.tanh(2 * x) * (1 - t.reshape(-1, 1)), (3,), Flow())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x = sample(target, torch.randn(4, 3), "sit-xl-2-256/10")
assert x.shape == (4, 3) and x.isfinite().all()
said = [str(w.message) for w in caught if "dss_fast" in str(w.message)]
cpp = "cpp" in backends(torch.device("cpu"))
assert cpp == ("cpp" in sys.argv) and len(said) == (not cpp), (cpp, said)
assert cpp or "pip install --no-build-isolation" in said[0] and sys.argv[1] in said[0], said
if "search" in sys.argv:
    with tempfile.TemporaryDirectory() as out:
        result = search(target, 3, budget=3000, out=out, progress=False)
        assert Solver.load(Path(out) / "solver-3.json") == result.solver
'
torch_of() { "$1" -c 'import torch; print(torch.__version__)' 2>/dev/null; }
say() { printf '%-10s %s\n' "$version" "$*"; }

for python in "${@:-python3}"; do
  version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')
  work=$OUT/$version && rm -rf "$work" && mkdir -p "$work/dist"
  if [ -n "${VENV:-}" ]; then bin=$VENV/bin; else
    "$python" -m venv "$work/venv" && bin=$work/venv/bin
    "$bin/pip" install -q "${TORCH:-torch==2.13.0}" 'setuptools>=64'
  fi
  before=$(torch_of "$bin/python")
  cp -r csrc dss_fast tests setup.py pyproject.toml MANIFEST.in README.md CHANGELOG.md LICENSE "$work"
  rm -f "$work"/dss_fast/*.so
  install() { "$bin/pip" uninstall -qy dss_fast; (cd "$work" && "$bin/pip" install -q "$@"); }
  smoke() { (cd / && "$bin/python" -c "$SMOKE" "$@"); }

  install .
  smoke "was not built" search && say "pip install . : pure Python, no second torch; a search with its folder"
  install --no-build-isolation --no-deps .
  smoke cpp && say "pip install --no-build-isolation --no-deps . : with the extension"
  (cd / && "$bin/python" -c "import torch; torch.__version__ = '2.11.0'; $SMOKE" "built for another torch")
  say "with another torch than it was built for: one line, plain PyTorch"
  CC=nothing CXX=nothing install --no-build-isolation --no-deps .
  smoke "with a C++ compiler" && say "without a compiler: pure Python"

  "$bin/pip" install -q build
  (cd "$work" && "$bin/python" -m build --no-isolation -o dist . >build.log 2>&1) || { tail -20 "$work/build.log"; exit 1; }
  say "$(cd "$work/dist" && echo *)"
  install "$work"/dist/*.whl
  smoke cpp && say "the wheel: with the extension"
  install --no-build-isolation --no-deps "$work"/dist/*.tar.gz
  smoke cpp && say "the sdist: with the extension"
  install "$work[all]"
  smoke "was not built" search && say "'.[all]': a search with its folder and pictures"
  "$bin/pip" check >/dev/null && [ "$(torch_of "$bin/python")" = "$before" ] && say "torch is still $before; pip check passes"
  [ "$("$bin/dss_fast" --version)" = "$("$bin/pip" show dss_fast | sed -n 's/^Version: //p')" ]
done
