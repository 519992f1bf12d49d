"""The local Hub answers the libraries of Hugging Face as the real one does; each test is a user in a fresh process."""

import pytest
from local_hub import run_python


pytestmark = pytest.mark.full


def test_pushed_bytes_come_back_equal(hub, tmp_path):
    contents = {
        "notes.txt": b"plain",
        "empty.safetensors": b"",
        "weights/model.safetensors": bytes(range(256)) * 50,
        "weights/größe.json": b"{}",
    }
    for path, content in contents.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    code = """
        import io, sys
        from pathlib import Path
        from huggingface_hub import create_repo, hf_hub_download, list_repo_files, snapshot_download
        from huggingface_hub import upload_file, upload_folder

        create_repo("org/name")
        create_repo("org/name", exist_ok=True)
        upload_folder(repo_id="org/name", folder_path=sys.argv[1])
        upload_file(repo_id="org/name", path_or_fileobj=io.BytesIO(b"from memory"), path_in_repo="memory.bin")

        pushed, pulled = Path(sys.argv[1]), Path(snapshot_download("org/name"))
        paths = [path.relative_to(pushed) for path in pushed.rglob("*") if path.is_file()]
        assert sorted(list_repo_files("org/name")) == sorted([".gitattributes", "memory.bin", *map(str, paths)])
        for path in paths:
            assert (pulled / path).read_bytes() == (pushed / path).read_bytes(), path
        assert Path(hf_hub_download("org/name", "memory.bin")).read_bytes() == b"from memory"
    """
    run_python(code, hub, tmp_path)
    files = hub.repos["models/org/name"].find("main").files
    assert {path: files[path].content for path in contents} == contents
    # The client keeps empty files out of LFS.
    assert sorted(path for path in files if files[path].in_lfs) == ["memory.bin", "weights/model.safetensors"]


def test_a_revision_reads_its_own_commit_or_branch(hub):
    code = """
        from pathlib import Path
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfFileSystem
        from huggingface_hub import create_branch, create_commit, create_repo, hf_hub_download
        from huggingface_hub import list_repo_refs, list_repo_tree, model_info, upload_file

        def push(text, revision):
            return upload_file(
                repo_id="org/name", path_or_fileobj=text.encode(), path_in_repo="a.txt", revision=revision
            ).oid

        def pull(revision):
            return Path(hf_hub_download("org/name", "a.txt", revision=revision)).read_text()

        create_repo("org/name")
        first, second = push("first", "main"), push("second", "main")
        create_branch("org/name", branch="dev/wide", revision=first)
        third = push("third", "dev/wide")
        assert [pull(revision) for revision in (first, second, "main")] == ["first", "second", "second"]
        assert [pull(revision) for revision in (third, "dev/wide")] == ["third", "third"]
        branches = {branch.name: branch.target_commit for branch in list_repo_refs("org/name").branches}
        assert branches == {"main": second, "dev/wide": third}
        assert model_info("org/name").sha == second and model_info("org/name", revision=first).sha == first
        assert push("second", "main") == second, "unchanged bytes make no commit"

        operations = [CommitOperationAdd("folder/b.txt", b"0123456789"), CommitOperationDelete("a.txt")]
        fourth = create_commit("org/name", operations, commit_message="move", parent_commit=second)
        assert [entry.path for entry in list_repo_tree("org/name")] == [".gitattributes", "folder"]
        assert [entry.path for entry in list_repo_tree("org/name", "folder")] == ["folder/b.txt"]
        assert pull(second) == "second"
        print(fourth.oid)
        assert HfFileSystem().cat_file("org/name/folder/b.txt", start=2, end=5) == b"234"
    """
    last_sha = run_python(code, hub).strip()
    repo = hub.repos["models/org/name"]
    assert repo.branches["main"] == last_sha
    assert repo.commits[last_sha].title == "move"


def test_what_is_missing_raises_the_exception_of_the_real_hub(hub):
    code = """
        import huggingface_hub as hf
        from huggingface_hub import errors

        def raised(call, *arguments, **options):
            try:
                call(*arguments, **options)
            except errors.HfHubHTTPError as error:
                return type(error), error.response.status_code

        hf.create_repo("org/name")
        no_repo, no_entry = (errors.RepositoryNotFoundError, 404), (errors.RemoteEntryNotFoundError, 404)
        assert issubclass(errors.RemoteEntryNotFoundError, errors.EntryNotFoundError)
        assert raised(hf.model_info, "org/absent") == no_repo
        assert raised(hf.snapshot_download, "org/absent") == no_repo
        assert raised(hf.hf_hub_download, "org/absent", "a.txt") == no_repo
        assert raised(hf.dataset_info, "org/name") == no_repo, "a model is no dataset"
        assert raised(hf.hf_hub_download, "org/name", "absent.txt") == no_entry
        assert raised(lambda: list(hf.list_repo_tree("org/name", "absent"))) == no_entry
        assert raised(hf.model_info, "org/name", revision="absent") == (errors.RevisionNotFoundError, 404)
        assert hf.repo_exists("org/name") and not hf.repo_exists("org/absent")
        assert hf.file_exists("org/name", ".gitattributes") and not hf.file_exists("org/name", "absent.txt")

        start = hf.model_info("org/name").sha
        additions = [hf.CommitOperationAdd("a.txt", b"")]
        hf.create_commit("org/name", additions, commit_message="one")
        additions = [hf.CommitOperationAdd("b.txt", b"")]
        stale = raised(hf.create_commit, "org/name", additions, commit_message="two", parent_commit=start)
        assert stale == (errors.HfHubHTTPError, 412)
        assert raised(hf.create_repo, "org/name") == (errors.HfHubHTTPError, 409)
    """
    run_python(code, hub)


def test_a_dataset_comes_back_equal_whole_and_streamed(hub):
    code = """
        from datasets import Dataset, DatasetDict, load_dataset

        columns = {"step": range(300), "action": [[row, row + 1] for row in range(300)], "name": ["maze"] * 300}
        pushed = Dataset.from_dict({name: list(values) for name, values in columns.items()})
        pushed.push_to_hub("org/data", max_shard_size="2KB")
        assert load_dataset("org/data", split="train")[:] == pushed[:]
        assert list(load_dataset("org/data", split="train", streaming=True)) == list(pushed)

        DatasetDict({"train": pushed, "test": pushed.select(range(3))}).push_to_hub("org/data", revision="small")
        assert load_dataset("org/data", split="test", revision="small")[:] == pushed[:3]
        assert list(load_dataset("org/data")) == ["train"]
    """
    run_python(code, hub)
    shards = [path for path in hub.repos["datasets/org/data"].find().files if path.endswith(".parquet")]
    assert len(shards) > 1


def test_a_pipeline_and_a_model_come_back_equal(hub):
    code = """
        import torch
        from diffusers import AutoModel, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
        from transformers import AutoModel as TransformersAutoModel
        from transformers import GPT2Config, GPT2Model

        def assert_equal(pulled, pushed):
            assert type(pulled) is type(pushed)
            torch.testing.assert_close(pulled.state_dict(), pushed.state_dict(), rtol=0, atol=0)

        torch.manual_seed(0)
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "layers_per_block": 1}
        unet = UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4, **blocks)
        pipeline = DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=7))
        pipeline.push_to_hub("org/pipeline")
        pulled = DiffusionPipeline.from_pretrained("org/pipeline")
        assert type(pulled) is DDPMPipeline and pulled.scheduler.config.num_train_timesteps == 7
        assert_equal(pulled.unet, unet)

        unet.push_to_hub("org/unet")
        assert_equal(AutoModel.from_pretrained("org/unet"), unet)

        language_model = GPT2Model(GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=1))
        language_model.push_to_hub("org/language-model")
        assert_equal(TransformersAutoModel.from_pretrained("org/language-model"), language_model)
    """
    run_python(code, hub)


def test_a_user_process_has_no_settings_or_files_of_ours(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    script = tmp_path / "user.py"
    script.write_text("import os, sys; print(os.listdir(), os.path.exists(os.environ['HF_HOME']), *sys.argv[1:])")
    assert run_python(script, hub, "--steps", 3) == "[] False --steps 3\n"
    assert run_python("import os; print(*sorted(name for name in os.environ if 'OFFLINE' in name))", hub) == "\n"
    with pytest.raises(AssertionError, match="ValueError: no such maze"):
        run_python("raise ValueError('no such maze')", hub)
