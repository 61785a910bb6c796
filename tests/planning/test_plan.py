"""``xtuner plan``: what it prints, its exit status, JSON, and the config that it writes."""

import json

import pytest

from tests.helpers.architectures import make_config
from tests.helpers.image_text import image_text_folder
from tests.helpers.tiny import make_tokenizer, save_tiny
from tests.helpers.tiny_internvl import save_internvl
from tests.helpers.vision_language import PATCHES, save_clip
from xtuner.config.load import load
from xtuner.configs.render import width
from xtuner.entry_point import main
from xtuner.planning.cards import CARDS, card
from xtuner.planning.plan import Machine, Measured, Planner
from xtuner.planning.schedule import operations_per_token
from xtuner.planning.settings import read_settings
from xtuner.utils.errors import UserError

IMAGE_CONFIG = "tests/equivalence/image_text_config.py"
CONFIG = "qwen3_8b_qlora_custom_sft_e1"


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = make_config("qwen3")
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    data = folder / "data.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"{n}?"},
                          {"role": "assistant", "content": "yes"}]} for n in range(60)]  # fmt: skip
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return [
        f"pretrained_model_name_or_path={folder}",
        f"data_files={str(data)!r}",
        "pack_to_max_length=False",
    ]


def plan(capsys, *words):
    status = main(["plan", CONFIG, *map(str, words)])
    return status, capsys.readouterr()


def test_it_fits(capsys, options):
    status, said = plan(capsys, "--gpu", "RTX 4090", "--cfg-options", *options)
    assert status == 0 and "It fits: " in said.out and "RTX4090" in said.out
    assert "4 optimizer steps" in said.out  # 60 rows, 16 to a step
    for part in ("weights", "gradients", "optimizer", "activations", "disk: "):
        assert part in said.out


def test_it_does_not_fit(capsys, options, tmp_path):
    out = tmp_path / "smaller.py"
    words = ["--no-data", "--gpu", "0.5GB", "--apply", out, "--cfg-options", *options]
    status, said = plan(capsys, *words)
    assert status == 1 and "does not fit" in said.out
    assert out.is_file() and load(str(out)).values["max_length"] <= 2048
    status, said = plan(capsys, *words)
    assert status == 1 and "is there already" in said.err


def test_chinese_stands_in_columns(capsys, options, monkeypatch):
    monkeypatch.setenv("XTUNER_LANG", "zh")
    status, said = plan(capsys, "--no-data", "--cfg-options", *options)
    table = [line for line in said.out.splitlines() if line.endswith("iB") and line[0] == " "]
    assert status == 0 and "激活值" in said.out and len(table) > 5
    assert len({width(line) for line in table}) == 1


def test_what_is_applied_fits(capsys, options, tmp_path):
    out = tmp_path / "smaller.py"
    more = [*options, "batch_size=64", "model.use_activation_checkpointing=False"]
    words = ["--no-data", "--gpu", "0.9GB"]
    status, said = plan(capsys, *words, "--apply", out, "--cfg-options", *more)
    assert status == 1 and "does not fit" in said.out
    text = out.read_text("utf-8")
    assert text.startswith("# Changed by 'xtuner plan':\n#   recompute activations")
    assert f"xtuner train {out}" in said.out
    status = main(["plan", str(out), *words])
    assert status == 0 and "It fits: " in capsys.readouterr().out


def test_json(capsys, options):
    status, said = plan(capsys, "--json", "--no-data", "--cfg-options", *options)
    found = json.loads(said.out)
    assert status == 0 and found["fits"] is None
    assert found["total"] == sum(found["memory"].values())
    assert found["schedule"]["steps"] is None and found["changes"] == []


def test_data_that_are_not_here(capsys, options):
    words = [*options[:1], "data_files='missing.jsonl'"]
    status, said = plan(capsys, "--cfg-options", *words)
    assert status == 0 and "missing.jsonl" in said.err
    assert "steps and time are not known" in said.err and "optimizer steps" not in said.out


def test_a_model_that_is_not_here(capsys):
    status, said = plan(capsys, "--no-data", "--cfg-options",
                        "pretrained_model_name_or_path=./nowhere")  # fmt: skip
    assert status == 1 and "nowhere" in said.err and "Traceback" not in said.err


def test_images_are_counted_where_their_layers_are_trained(capsys):
    """A frozen visual encoder keeps nothing of them."""
    activations, base = [], str(image_text_folder("gemma3"))
    capsys.readouterr()  # of libraries that are imported to make the folder
    for settings in ("True True", "True False", "False False"):
        encoder, projector = settings.split()
        words = [f"base={base!r}", "adapter=True",
                 f"model.freeze_visual_encoder={encoder}",
                 f"model.freeze_projector={projector}"]  # fmt: skip
        assert main(["plan", IMAGE_CONFIG, "--no-data", "--json", "--cfg-options", *words]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["images"] == ("" if projector == "True" else "counted")
        activations.append(found["memory"]["activations"])
    assert activations[0] < activations[1] < activations[2]


def test_images_that_cannot_be_counted_are_said(capsys, monkeypatch):
    """A class that looks at values that depend on weights."""

    def fail(*_, **__):
        raise RuntimeError

    monkeypatch.setattr("transformers.Gemma3Model.get_image_features", fail)
    words = [f"base={str(image_text_folder('gemma3'))!r}", "frozen=False"]
    assert main(["plan", IMAGE_CONFIG, "--no-data", "--cfg-options", *words]) == 0
    assert "what they keep of images is not counted" in capsys.readouterr().out


def test_llava_and_internvl(capsys, tmp_path):
    """By config.json and tokenizer alone: InternVL's class loads all of its parts itself."""
    folder = save_internvl(tmp_path / "internvl")
    (folder / "model.safetensors").unlink()
    words = ["plan", "internvl_v2_internlm2_5_8b_qlora_finetune", "--no-data", "--json"]
    assert main([*words, "--cfg-options", f"path={folder}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == "counted" and found["sizes"]["quantized"] > 0
    llm, clip = save_tiny(tmp_path / "llm"), save_clip(tmp_path / "clip")
    words = [f"llm_name_or_path={llm}", f"visual_encoder_name_or_path={clip}", "max_length=100"]
    name = "llava_internlm2_chat_1_8b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune"
    assert main(["plan", name, "--no-data", "--json", "--cfg-options", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == "counted" and found["settings"]["length"] == 100 + PATCHES - 1


def test_calibration_takes_real_steps(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "quickstart", "--calibrate", "--gpu", "24GB"]) == 0
    said = capsys.readouterr().out
    assert "measured on cpu: " in said and "at the measured speed" in said


def test_measured_memory_corrects_all_plans(options):
    planner, document = Planner(rows=100), load_with(load(CONFIG), options)
    alone = planner.plan(document, Machine())
    others = alone.memory.total - alone.memory.activations
    fixed = others - alone.memory.libraries - alone.memory.margin
    planner.calibrate(Measured("a GPU", fixed + 3 * alone.memory.activations, 2.0, 50.0), alone)
    again, more = planner.plan(document, Machine()), planner.plan(document, Machine(gpus=2))
    assert again.memory.activations == 3 * alone.memory.activations == more.memory.activations
    # 100 rows of one micro-batch each, however many tokens they really have
    assert again.schedule.seconds == pytest.approx(100 * 2.0)
    assert more.schedule.seconds == pytest.approx(50 * 2.0)
    halved = planner.plan(load_with(document, ["max_length=1024"]), Machine())
    assert halved.schedule.seconds == pytest.approx(100 * 1.0)


def test_gpus_that_share_rows(options):
    document = load_with(load(CONFIG), options)
    alone = Planner(rows=64).plan(document, Machine(gpus=4))
    shared = Planner(rows=64).plan(
        load_with(load(CONFIG), [*options, "sequence_parallel_size=4"]), Machine(gpus=4)
    )
    assert shared.settings.sequence_parallel == 4 and shared.settings.replicas == 1
    assert abs(4 * shared.memory.activations - alone.memory.activations) < 32
    # the catalogue's configs keep the rows of a step
    assert shared.settings.accumulative_counts == 4 * alone.settings.accumulative_counts
    assert shared.schedule.steps == alone.schedule.steps
    assert shared.schedule.tokens == alone.schedule.tokens


def test_offloaded_shards_are_in_main_memory(options):
    document = load_with(load(CONFIG), options)
    on_gpu = Planner().plan(document, Machine(gpus=2, fsdp=True)).memory
    offloaded = Planner().plan(document, Machine(gpus=2, fsdp=True, offload=True)).memory
    assert on_gpu.offloaded == 0 < offloaded.offloaded
    state = [m.weights + m.gradients + m.optimizer for m in (on_gpu, offloaded)]
    assert state[0] - state[1] == offloaded.offloaded


def test_the_command_names_all_machines(capsys, options):
    words = ["--no-data", "--gpu", "0.9GB", "--gpus", 2, "--nodes", 2]
    _, said = plan(capsys, *words, "--cfg-options", *options, "batch_size=64")
    assert "NPROC_PER_NODE=2 NNODES=2 NODE_RANK=0 " in said.out


def test_the_quickstart_makes_its_model_first(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "quickstart", "--no-data", "--gpu", "8GB"]) == 0
    assert "It fits" in capsys.readouterr().out


def test_a_card_that_does_not_exist(capsys):
    status, said = plan(capsys, "--gpu", "RTX9999")
    assert status == 1 and "RTX9999" in said.err and "--gpu 24GB" in said.err


def test_cards():
    assert card("24GB").memory == card("24").memory == 24 * 2**30
    assert card("4090") is card("rtx 4090") is card("GeForce RTX 4090") is CARDS["RTX4090"]
    assert card("Tesla T4").tflops == 65
    with pytest.raises(UserError, match="no GPU"):
        card("-3GB")


def test_sharding_is_read_from_strategies(options):
    document = load(CONFIG)
    plans = {
        name: Planner()
        .plan(load_with(document, options), Machine(gpus=4, **{key: value}))
        .settings.sharding
        for name, key, value in (
            ("zero2", "deepspeed", "deepspeed_zero2"),
            ("zero3", "deepspeed", "deepspeed_zero3_offload"),
            ("fsdp", "fsdp", True),
            ("ddp", "fsdp", False),
        )
    }
    assert [each.name for each in plans.values()] == list(plans)
    assert plans["zero3"].offload_optimizer and not plans["zero2"].offload_optimizer


def load_with(document, options):
    from xtuner.config.override import override

    return override(document, options)


def test_settings_of_a_config(options):
    settings = read_settings(load_with(load(CONFIG), [*options, "max_length=512"]).config, 2)
    assert (settings.length, settings.batch_size, settings.sequences) == (512, 1, 1)
    assert settings.accumulative_counts == 16 and settings.optimizer == "AdamW"
    assert settings.dtype == "bfloat16" and settings.checkpointing
    assert settings.sharding.ranks == 2 and settings.sharding.name == "ddp"


@pytest.mark.parametrize(
    ("changes", "fused"),
    [
        ([], True),
        (["optim_wrapper.optimizer.foreach=True"], False),
        (["optim_wrapper.optimizer.foreach=False"], True),  # one weight after the other
        (["optim_type=torch.optim.NAdam"], False),
        (["optim_type=bitsandbytes.optim.AdamW8bit"], True),
    ],
)
def test_optimizers_that_copy_weights(options, changes, fused):
    assert read_settings(load_with(load(CONFIG), [*options, *changes]).config, 1).fused == fused


def test_operations():
    assert operations_per_token(10, 10) == 60  # 6 N
    assert operations_per_token(10, 0, recomputed=1.0) == 60
