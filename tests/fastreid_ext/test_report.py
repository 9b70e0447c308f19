"""Records of a run in FastReID for its report."""

from selcon_plugin.fastreid_ext import SelConTrainer
from selcon_plugin.fastreid_ext.results import write_results
from selcon_plugin.hosts import get_host, host_of_settings
from selcon_plugin.report import collect_run, finish_run
from selcon_plugin.report.page import changed_settings
from selcon_plugin.runs.embedding import EmbeddingRecord


def trained(cfg, **changes):
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    trainer = SelConTrainer(cfg)
    with trainer.meter.running():
        results = trainer.train()
    with open(f"{cfg.OUTPUT_DIR}/config.yaml", "w") as stream:
        stream.write(trainer.cfg.dump())
    write_results(trainer, results)
    finish_run(cfg.OUTPUT_DIR, get_host("fastreid"))
    return collect_run(cfg.OUTPUT_DIR, find_host=host_of_settings)


def test_a_run_leaves_a_report(tiny_cfg):
    run = trained(tiny_cfg, MODEL__SELCON__SEED=5)
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "same person" in page
    assert page.count("data:image") > 20
    assert run.broken == ()
    assert run.curve("mAP").last == run.metrics["SyntheticPersons"]["mAP"]
    assert changed_settings(run)["MODEL.SELCON.SEED"] == (5, 0)
    assert "MODEL.SELCON.TEMPERATURE" not in changed_settings(run)
    # No clusters: the features are those of the banks, at the end of the run.
    assert (run.embedding.epoch, run.embedding.clustered) == (2, False)
    (queries,) = run.ranked.values()
    average = [100 * query.average_precision for query in queries]
    assert 0 < sum(average) / len(average) < 100
    assert all(q.results[0].distance <= q.results[-1].distance for q in queries)


def test_a_run_without_a_test_set_has_clusters_and_neighbors(tiny_cfg):
    run = trained(
        tiny_cfg,
        DATASETS__TESTS=(),
        MODEL__SELCON__METHOD="ClusterContrast",
        MODEL__SELCON__CLUSTERING__EPS=0.7,
        MODEL__SELCON__CLUSTERING__K1=8,
        MODEL__SELCON__CLUSTERING__K2=3,
        MODEL__SELCON__CLUSTERING__MIN_SAMPLES=2,
        MODEL__SELCON__NUM_NEIGHBORS=None,
        MODEL__SELCON__NUM_NEGATIVES=None,
        MODEL__SELCON__WARMUP_EPOCHS=None,
        MODEL__SELCON__REPORT_IMAGES=False,
    )
    changed = changed_settings(run)
    assert changed["MODEL.SELCON.METHOD"] == ("ClusterContrast", "SelectiveContrastive")
    assert "MODEL.SELCON.BANK_MOMENTUM" not in changed  # the method's own default
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "Nearest neighbors" in page
    assert "data:image" not in page
    record = EmbeddingRecord.load(run.folder)
    assert record.distance == "Jaccard"
    assert record.clustered
    assert record.eps == 0.7
    assert (run.folder / "embedding.npz").stat().st_size < 20_000
