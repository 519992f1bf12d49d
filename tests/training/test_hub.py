import pytest
from huggingface_hub import ModelCard
from local_hub import run_python
from tiny_models import tiny_pipeline

from diffusers_far.pipelines.model_card import is_unedited, model_card, results_section, signed, write_card
from diffusers_far.training.config import FARSettings, parse_settings
from diffusers_far.training.lora import add_lora, lora_card


def parse(*arguments: str) -> FARSettings:
    if not {"--latents_dir", "--dataset_name"} & set(arguments):
        arguments = (*arguments, "--latents_dir", "latents")
    return parse_settings(FARSettings, arguments=["--output_dir", "run", *arguments])


@pytest.mark.parametrize(
    "arguments, known",
    [
        ("", {}),
        ("--license mit", {"license": "mit"}),
        ("--dataset_name org/mazes", {"datasets": ["org/mazes"]}),
        ("--dataset_name .", {}),
        ("--dataset_name . --dataset_ids org/mazes org/walks", {"datasets": ["org/mazes", "org/walks"]}),
        ("--latents_dir . --dataset_ids org/mazes", {"datasets": ["org/mazes"]}),
        ("--pretrained_model_name_or_path .", {}),
        ("--pretrained_model_name_or_path org/far", {"base_model": "org/far", "base_model_relation": "finetune"}),
        (
            "--pretrained_model_name_or_path . --base_model_id org/far",
            {"base_model": "org/far", "base_model_relation": "finetune"},
        ),
    ],
)
def test_a_card_tells_the_hub_what_was_said_or_has_an_id_and_invents_nothing(arguments, known):
    assert parse(*arguments.split()).known_metadata(relation="finetune") == known
    card = ModelCard(model_card(tiny_pipeline(), "me/far", {}, known)).data.to_dict()
    assert card.items() >= {**known, "library_name": "diffusers", "pipeline_tag": "video-to-video"}.items()
    assert "arxiv:2503.19325" in card["tags"]
    assert {"license", "datasets", "base_model"} & card.keys() == {"license", "datasets", "base_model"} & known.keys()


def test_the_card_of_an_adapter_has_the_same_beside_its_own():
    pipe = tiny_pipeline()
    add_lora(pipe.transformer, rank=2, alpha=2.0, dropout=0.0, targets=["to_q"])
    card = ModelCard(lora_card(pipe, "me/doom", ".", {}, {"license": "mit", "base_model": "org/far"})).data.to_dict()
    assert card["license"] == "mit" and card["base_model"] == "org/far" and card["pipeline_tag"] == "video-to-video"
    assert {"lora", "arxiv:2503.19325"} <= set(card["tags"])


@pytest.mark.parametrize("wrong", ["--license Apache 2.0", "--dataset_ids a/b/c", "--base_model_id ../far"])
def test_a_licence_or_an_id_that_the_hub_does_not_know_stops_the_run_before_it_starts(wrong, capsys):
    flag, value = wrong.split(maxsplit=1)
    with pytest.raises(SystemExit):
        parse(flag, value)
    assert "the Hub, such as" in capsys.readouterr().err


def test_a_signed_card_is_known_as_unedited_until_a_letter_changes():
    card = signed("# Doom\n\nText.\n\n")
    assert card.startswith("# Doom\n\nText.\n") and is_unedited(card) and is_unedited(card.rstrip("\n"))
    assert signed("# Doom\n\nText.") == card
    for edited in (card.replace("Text", "Texts"), card + "More.\n", "# Doom\n\nText.\n", ""):
        assert not is_unedited(edited)


def test_a_runs_own_card_is_replaced_and_an_edited_one_kept(tmp_path, caplog):
    assert write_card(tmp_path, "step 1") and write_card(tmp_path, "step 2")
    readme = tmp_path / "README.md"
    assert readme.read_text().startswith("step 2") and is_unedited(readme.read_text())
    readme.write_text(readme.read_text().replace("step 2", "mine"))
    assert not write_card(tmp_path, "step 3")
    assert readme.read_text().startswith("mine") and "was edited and is kept" in caplog.text


def test_results_stand_before_beside_after_with_the_video():
    before, after = {"loss": 0.5, "psnr": 10.0, "psnr_of_frame_1": 11.0}, {"loss": 0.25, "psnr": 12.0}
    section = results_section(before, after, "sample.mp4")
    assert "| | before | after |\n|---|---|---|\n| held-out loss | 0.5 | 0.25 |\n| PSNR, mean" in section
    assert "10 | 12 |" in section and "first predicted" not in section  # measured on one side only
    assert '<video controls loop src="sample.mp4"></video>' in section
    assert "| | after |\n|---|---|\n" in results_section(None, after)


def test_a_run_without_a_validation_split_says_that_nothing_was_measured():
    assert "Not measured" in results_section(None, None) and "<video" not in results_section(None, None)


@pytest.mark.full
def test_a_folder_is_pushed_without_checkpoints_and_logs_and_keeps_a_card_edited_on_the_hub(hub, tmp_path):
    for name in (
        "weights.safetensors",
        "transformer/config.json",
        "logs/run/events",
        "checkpoint-2/optimizer.bin",
        "unfinished-checkpoint-4/optimizer.bin",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    code = """
        import sys
        from pathlib import Path
        from huggingface_hub import create_repo, hf_hub_download, upload_file
        from diffusers_far.pipelines.hub import push_folder
        from diffusers_far.pipelines.model_card import write_card

        folder = Path(sys.argv[1])
        repo_id = create_repo("doom").repo_id

        def push(card):
            write_card(folder, card)
            push_folder(folder, repo_id, commit_message=card)
            return Path(hf_hub_download(repo_id, "README.md", force_download=True)).read_text()

        assert push("step 1").startswith("step 1")
        assert push("step 2").startswith("step 2")
        upload_file(repo_id=repo_id, path_or_fileobj=b"# By hand", path_in_repo="README.md")
        (folder / "weights.safetensors").write_text("2")
        assert push("step 3") == "# By hand"
    """
    run_python(code, hub, tmp_path)
    head = hub.repos["models/local-user/doom"].find()
    assert head.title == "step 3"
    assert sorted(head.files) == [".gitattributes", "README.md", "transformer/config.json", "weights.safetensors"]
    assert head.files["weights.safetensors"].content == b"2"
