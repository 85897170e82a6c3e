"""What the package's source does not contain: networks, pickles, code made from text, writers beside files.py."""

import ast
from pathlib import Path

import pytest

import dss_fast

pytestmark = pytest.mark.fast
ROOT = Path(dss_fast.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
NETWORKS = {
    "socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "telnetlib",
    "xmlrpc", "asyncio", "websockets", "huggingface_hub",
}  # fmt: skip
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "copyreg"}
PROCESSES = {"subprocess", "multiprocessing", "pty", "popen2"}
MADE_FROM_TEXT = {"eval", "exec", "compile", "__import__", "execfile"}
UNPICKLING = {"torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "numpy.load", "np.load"}
# What each of these files may do that no other may.
ALLOWED = {
    ("hub.py", "huggingface_hub"),  # where a user names an address there or pushes: JSON files alone
    ("hub.py", "hf_hub_download"),
    # torch.distributed sends Python objects between the processes of one search by pickling them: from process to
    # process of one user, never from a file.
    ("searching/processes.py", "broadcast_object_list"),
    ("searching/processes.py", "all_gather_object"),
    # The command for a pipeline hands a folder or a hub id to diffusers; a folder fetches nothing.
    ("integrations/diffusers/command.py", "from_pretrained"),
}
WRITERS = {"write_text", "write_bytes", "savez", "tofile", "dump"}


def dotted(node):
    """``a.b.c`` of a call's function; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}".lstrip(".")
    return ""


def findings(path, root=ROOT):
    """(what, line) for each thing a source should not have."""
    name = path.relative_to(root).as_posix()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or ""]
        for module in modules:
            if module.split(".")[0] in NETWORKS | PICKLES | PROCESSES and (name, module) not in ALLOWED:
                yield f"imports {module}", node.lineno
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        last = called.split(".")[-1]
        if called in MADE_FROM_TEXT | UNPICKLING or called in ("os.system", "os.popen") or called.startswith("os.exec"):
            yield f"calls {called}", node.lineno
        fetching = ("from_pretrained", "hf_hub_download", "urlopen", "load_state_dict_from_url")
        if last in fetching and (name, last) not in ALLOWED:
            yield f"calls {called}", node.lineno
        if last in ("broadcast_object_list", "all_gather_object", "send_object_list") and (name, last) not in ALLOWED:
            yield f"calls {called}", node.lineno
        if name != "files.py" and isinstance(node.func, ast.Attribute) and last in WRITERS:
            yield f"writes by {called}", node.lineno
        if name != "files.py" and called == "open" and any(mode in ast.unparse(node) for mode in ("'w", "'x")):
            yield "writes by open", node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_network_no_pickle_no_code_from_text_no_other_writer(path):
    assert list(findings(path)) == []


def test_the_search_finds_what_it_looks_for(tmp_path):
    """It is a test that can fail."""
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import pickle, urllib.request\nfrom socket import socket\neval('1')\ntorch.load('x')\nopen('a', 'w')\n"
        "path.write_text('x')\nos.system('ls')\nPipe.from_pretrained('x')\n"
    )
    assert len(list(findings(bad, tmp_path))) == 9
