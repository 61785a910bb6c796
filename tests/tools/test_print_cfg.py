"""xtuner print-cfg: the resolved config, and --why."""

from xtuner.entry_point import main

NAME = "internlm2_chat_7b_qlora_alpaca_e3"


def test_values_are_spelled_out(capsys):
    assert main(["print-cfg", NAME, "--cfg-options", "lr=3e-5", "max_length=77"]) == 0
    out = capsys.readouterr().out
    assert "optimizer=dict(type=AdamW, lr=3e-05, betas=(0.9, 0.999), weight_decay=0)" in out
    assert out.count("max_length=77") == 2  # the dataset, and the dataset in the dataloader


def test_why(capsys):
    assert main(["print-cfg", NAME, "--why", "optim_wrapper.optimizer.lr"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.endswith("optim_wrapper.optimizer.lr = lr")
    assert last.endswith("lr = 2e-4") and f"{NAME}.py:" in last


def test_bad_input(capsys):
    assert main(["print-cfg", NAME, "--why", "optim_wrapper.lr"]) == 1
    assert main(["print-cfg", "no_such_name_at_all"]) == 1
    err = capsys.readouterr().err
    assert "there is no key 'optim_wrapper.lr'" in err and "Traceback" not in err
