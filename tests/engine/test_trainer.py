import json
import os

import pytest
from detectron2.data import build_detection_train_loader
from detectron2.evaluation import DatasetEvaluator

from kn_detectron import InputError
from kn_detectron.engine import Trainer
from kn_detectron.engine.evaluation import build_coco_evaluator
from kn_detectron.engine.hooks import AverageRunningStatistics

from . import tiny


def test_settings_for_more_gpus_are_scaled(datasets, tmp_path):
    """Half the images of each step: half the learning rate, and twice the steps."""
    cfg = tiny.config(tmp_path, "SOLVER.REFERENCE_WORLD_SIZE", 2)
    images, rate, steps, ends = (
        cfg.SOLVER[key] for key in ("IMS_PER_BATCH", "BASE_LR", "MAX_ITER", "STEPS")
    )
    trainer, _ = tiny.trainer(cfg)
    solver = trainer.cfg.SOLVER
    assert solver.IMS_PER_BATCH == trainer._batches.loader.batch_size == images // 2
    assert trainer.max_iter == 2 * steps and solver.STEPS == tuple(2 * end for end in ends)
    for group in trainer.optimizer.param_groups:
        assert group["initial_lr"] == pytest.approx(rate / 2)


def test_running_statistics_are_averaged_where_they_are_saved_or_evaluated(datasets, tmp_path):
    periods = "SOLVER.CHECKPOINT_PERIOD", 3, "TEST.EVAL_PERIOD", 2
    trainer, _ = tiny.trainer(tiny.config(tmp_path, *periods))
    (hook,) = (h for h in trainer._hooks if isinstance(h, AverageRunningStatistics))
    assert hook._periods == [3, 2]


def test_a_trainer_without_data_is_a_sentence(datasets, tmp_path):
    with pytest.raises(InputError, match="^DATASETS.TRAIN is empty: name at least one dataset"):
        Trainer(tiny.config(tmp_path, "DATASETS.TRAIN", "()"))


def test_a_loader_that_cannot_be_resumed_is_refused(datasets, tmp_path):
    class WithDetectron2sLoader(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_detection_train_loader(cfg)

    with pytest.raises(InputError, match="return kn_detectron.data.build_train_loader"):
        WithDetectron2sLoader(tiny.config(tmp_path))


def test_an_evaluator_of_ones_own_gets_its_folder_as_in_detectron2(datasets, tmp_path):
    folders = []

    class WithEvaluator(Trainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name, output_folder=None):
            folders.append(output_folder)
            return build_coco_evaluator(cfg, dataset_name, output_folder)

    cfg = tiny.config(tmp_path, "TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (64,))
    WithEvaluator.test(cfg, WithEvaluator.build_model(cfg))
    assert folders == [None, os.path.join(cfg.OUTPUT_DIR, "inference_TTA")]


def test_plain_results_are_written_before_those_with_augmentation(datasets, tmp_path):
    class KilledInTheSecondRound(DatasetEvaluator):
        rounds = 0

        def reset(self):
            self.rounds += 1
            if self.rounds == 2:
                raise RuntimeError("killed")

        def evaluate(self):
            return {"bbox": {"AP": 50.0}}

    cfg = tiny.config(tmp_path, "TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (64,))
    with pytest.raises(RuntimeError, match="killed"):
        Trainer.test(cfg, Trainer.build_model(cfg), [KilledInTheSecondRound()])
    results = json.loads((tmp_path / "inference/results.json").read_text())
    assert results == {"bbox": {"AP": 50.0}}
