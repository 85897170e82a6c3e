"""One command for a pipeline, on tiny pipelines saved to disk with text encoders and tokenizers of their own."""

import os

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib", reason="the plots extra, in requirements.txt")

from dss_fast import Solver  # noqa: E402
from dss_fast.__main__ import main  # noqa: E402
from dss_fast.integrations.diffusers import DSSScheduler  # noqa: E402
from examples.tiny_pipelines import build  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
WORDS = ("[PAD]", "[UNK]", "a", "cat", "that", "holds", "sign", "the", "sea", "at", "night", "red", "house", "blurry")


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[PAD]", model_max_length=8
    )


def clip(width, projected=False):
    config = transformers.CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=width, bos_token_id=1, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config).eval()


def t5(width):
    config = transformers.T5Config(vocab_size=len(WORDS), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config).eval()


def saved(name, folder):
    """A tiny pipeline that takes prompts, as a folder."""
    torch.manual_seed(0)
    pipe, arguments = build(name)
    if name == "sd":
        pipe.register_modules(text_encoder=clip(32), tokenizer=tokenizer())
    elif name == "sd3":
        pipe.register_modules(text_encoder=clip(16, True), tokenizer=tokenizer())
        pipe.register_modules(text_encoder_2=clip(48, True), tokenizer_2=tokenizer())
        pipe.register_modules(text_encoder_3=t5(64), tokenizer_3=tokenizer())  # the first two fit side by side in it
        pipe.transformer = diffusers.SD3Transformer2DModel(
            **{**pipe.transformer.config, "joint_attention_dim": 64, "pooled_projection_dim": 64}
        )
        pipe.tokenizer_max_length = 8
    elif name == "flux":
        pipe.register_modules(text_encoder=clip(32), tokenizer=tokenizer())
        pipe.register_modules(text_encoder_2=t5(32), tokenizer_2=tokenizer())
    pipe.save_pretrained(folder)
    (folder / "prompts.txt").write_text("a cat that holds a sign\nthe sea at night\n\na red house\n")
    return type(pipe), {k: v for k, v in arguments.items() if k in ("height", "width")}


STEPS = {True: ["3,4"], False: ["4"]}
CALLS = {
    "sd": ("height=16", "width=16", "guidance_scale=4.0"),  # VP, a doubled batch
    "sd3": ("height=8", "width=8", "max_sequence_length=8"),  # a flow
    "flux": ("height=16", "width=16", "max_sequence_length=8", "true_cfg_scale=3.0", "negative_prompt=blurry"),
    "dit": (),  # by class
}


@pytest.mark.parametrize("name", CALLS)
def test_from_a_folder_to_solvers_and_pictures(name, tmp_path, capsys):
    kind, sizes = saved(name, tmp_path / "pipe")
    if name == "dit":
        (tmp_path / "pipe" / "prompts.txt").write_text("207\n360\n1\n")
    out, prompts = tmp_path / "out", tmp_path / "pipe" / "prompts.txt"
    command = [
        "search",
        str(tmp_path / "pipe"),
        "--prompts",
        str(prompts),
        "--steps",
        *STEPS[name == "dit"],
        "-o",
        str(out),
    ]
    settings = ["--samples", "8", "--budget", "2500"]
    assert main([*command, *settings, *(["--call", *CALLS[name]] if CALLS[name] else [])]) == 0
    said = capsys.readouterr().out
    numbers = "N = 3, 4" if name == "dit" else "N = 4"
    assert f"{kind.__name__}: 3 prompts, latents" in said and f"{numbers}: " in said and "2,500 evaluations" in said
    assert "ms a model evaluation" in said and "MB for a backward" in said
    solver = Solver.load(out / "solver-4.json")
    assert solver.name == "pipe/4" and solver.provenance["request"]["prompts"] == 3
    for n in (3, 4) if name == "dit" else (4,):
        assert (out / f"pipeline-{n}.png").read_bytes()[:4] == b"\x89PNG"

    lines = said.split("To use it:\n")[1].strip().splitlines()
    assert len(lines) == 3
    pipe = kind.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    scope = {"pipe": pipe, "prompt": "a red house"}
    if name == "dit":
        scope["prompt"] = [3]
    exec("\n".join(lines), scope)
    assert type(pipe.scheduler) is DSSScheduler and pipe.scheduler.solver == Solver.load(
        out / f"solver-{3 if name == 'dit' else 4}.json"
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["examples.mnist"], "or a pipeline of diffusers"),
        (["{pipe}"], "needs --prompts"),
        (["{pipe}", "--prompts", "{empty}"], "holds no prompts"),
        (["{pipe}", "--prompts", "{prompts}", "--call", "heigth=16"], "--call 'heigth=16': write name=value"),
        (["{pipe}", "--prompts", "{prompts}", "--space", "nonsense"], "nonsense"),
        (["{pipe}", "--prompts", "{absent}"], "absent.txt"),
        (["examples.mnist:flow", "--prompts", "{prompts}"], "--prompts goes with a pipeline"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments, message, tmp_path, capsys):
    saved("sd", tmp_path / "pipe")
    (tmp_path / "empty.txt").write_text("\n")
    names = {"pipe": tmp_path / "pipe", "prompts": tmp_path / "pipe" / "prompts.txt"}
    names |= {"empty": tmp_path / "empty.txt", "absent": tmp_path / "absent.txt"}
    given = [text.format(**names) for text in arguments]
    assert main(["search", *given, "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dss_fast search: ") and message in error


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes that are files")
@pytest.mark.parametrize(
    "kind, words",
    [("pipe", "not a file"), ("/dev/zero", "not a file"), ("huge", "larger than 8 MB"), ("latin", "UTF-8")],
)
def test_prompts_that_are_no_text_file_are_refused_before_the_pipeline_is_loaded(tmp_path, capsys, kind, words):
    prompts = tmp_path / "prompts.txt"
    if kind == "pipe":
        os.mkfifo(prompts)
    elif kind == "huge":
        with prompts.open("wb") as file:
            file.truncate(1 << 40)
    elif kind == "latin":
        prompts.write_bytes(b"un caf\xe9 au bord de la mer\n")
    else:
        prompts.symlink_to(kind)
    assert main(["search", "owner/name", "--prompts", str(prompts), "-o", str(tmp_path / "out")]) == 2
    assert "prompts.txt" in (said := capsys.readouterr().err) and words in said
