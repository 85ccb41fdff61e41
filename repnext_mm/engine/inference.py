"""A trained model, from its checkpoint alone, on images in memory."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope

from ..checkpoints import CheckpointError, RunCheckpoint, read_run
from ..classification.tested import is_classifier
from ..datasets.images import image_loader, read_image
from .config_file import load_config
from .errors import UserError
from .frameworks import import_framework
from .literals import LONGEST, assigned
from .resume import require_fit
from .schedule import name_of
from .stored import checkpoints_classes, config_classes, require_classes

#: What of a stored config decides a prediction.
NEEDED = ('model', 'default_scope', 'test_dataloader', 'val_dataloader')
#: Arrays of one image: boxes, scores, labels and maybe masks; or classes; or probabilities.
Result = dict[str, np.ndarray]


def config_of(checkpoint: RunCheckpoint, config: str | None = None) -> Config:
    """The config that a checkpoint was trained with.

    It is the given one, or what the checkpoint stores, of which nothing is run: MMEngine stores
    values alone.

    Raises:
        UserError: None is given and none is stored.
    """
    if config is not None:
        return load_config(config, {}, None, 'none')
    meta = checkpoint.content.get('meta') if isinstance(checkpoint.content, Mapping) else None
    text = meta.get('cfg') if isinstance(meta, Mapping) else None
    values: dict[str, Any] = {}
    if isinstance(text, str) and len(text) <= LONGEST:
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            tree = ast.Module([], [])
        targets = [s.targets for s in tree.body if isinstance(s, ast.Assign)]
        values = assigned(text, [t.id for (t, *_) in targets if isinstance(t, ast.Name)])
        lost = [t.id for (t, *_) in targets if isinstance(t, ast.Name) and t.id not in values]
        if needed := [name for name in lost if name in NEEDED]:
            raise UserError(
                f'{checkpoint.path} stores a config whose {needed[0]} is more than values, which '
                'is not run; name the config: --config FILE.'
            )
    if not isinstance(values.get('model'), dict):
        raise UserError(
            f'{checkpoint.path} does not store the config of its model; name the config: '
            '--config FILE.'
        )
    return Config(values)


def build_trained(cfg: Config, checkpoint: RunCheckpoint, device: str | None = None) -> BaseModel:
    """The model of a config with the weights of a checkpoint, to predict with.

    Raises:
        UserError: They do not fit, or were trained on other classes.
    """
    import_framework(cfg.get('default_scope'))
    settings = without_weights(cfg.model)
    if is_classifier(cfg):
        settings.update(teacher=None, pretrained=False)
    try:
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmengine'):
            model = revert_sync_batchnorm(MODELS.build(settings))
    except (KeyError, TypeError, ValueError) as error:
        reason = ' '.join(str(error).split())
        raise UserError(f'the model of {checkpoint.path} cannot be built: {reason}') from error
    content = checkpoint.content
    require_fit(model, content, checkpoint.path)
    require_classes(content, config_classes(cfg), checkpoint.path)
    state = {k.removeprefix('module.'): v for k, v in content['state_dict'].items()}
    own = model.state_dict()
    model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    return model.to(device or get_device()).eval()


def without_weights(node: Any) -> Any:
    """A config, or a part of one, that loads no pretrained weights."""
    if isinstance(node, dict):
        return type(node)(
            {k: without_weights(v) for k, v in node.items() if k not in ('init_cfg', 'pretrained')}
        )
    if isinstance(node, list | tuple):
        return type(node)(without_weights(item) for item in node)
    return node


class TrainedModel:
    """A trained model as a function of images.

    Args:
        checkpoint: Of a run, of this package or of mmdet or mmseg.
        config: Its config; None takes what the checkpoint stores.
        device: 'cpu', 'cuda:0' ...; None takes a GPU if there is one.

    Attributes:
        model: The model of mm.
        cfg: Its config.
        task: 'detection', 'segmentation' or 'classification'.
        classes: Names of the classes.
        transform: From an image `(H, W, 3)` to what the model takes.

    Raises:
        UserError: See `config_of` and `build_trained`.
    """

    def __init__(
        self, checkpoint: str | Path, config: str | None = None, device: str | None = None
    ) -> None:
        try:
            read = read_run(str(checkpoint))
        except CheckpointError as error:
            raise UserError(str(error)) from error
        self.cfg = config_of(read, config)
        self.model = build_trained(self.cfg, read, device)
        scope = self.cfg.get('default_scope')
        classifies = is_classifier(self.cfg)
        self.task = (
            'classification' if classifies else 'segmentation' if scope == 'mmseg' else 'detection'
        )
        classes = checkpoints_classes(read.content) or config_classes(self.cfg)
        self.classes: tuple[str, ...] = tuple(classes or self._numbered())
        self.transform = self._classifiers() if classifies else self._pipeline()

    @property
    def on_cpu(self) -> bool:
        """Whether the model computes on the CPU."""
        return next(self.model.parameters()).device.type == 'cpu'

    def _numbered(self) -> list[str]:
        weights = list(self.model.state_dict().values())
        return [f'class {i}' for i in range(weights[-1].shape[0])]

    def _dataset(self) -> Mapping[str, Any]:
        loader = self.cfg.get('test_dataloader') or self.cfg.get('val_dataloader') or {}
        dataset = loader.get('dataset')
        while isinstance(dataset, Mapping):
            inner = dataset.get('dataset') or dataset.get('datasets')
            if inner is None:
                return dataset
            dataset = inner[0] if isinstance(inner, Sequence) else inner
        raise UserError('the config has no test_dataloader, whose pipeline prepares images.')

    def _pipeline(self) -> Any:
        steps = list(self._dataset().get('pipeline') or ())
        self._loader = image_loader(steps)
        kept = [step for step in steps if not name_of(step).startswith('Load')]
        with DefaultScope.overwrite_default_scope(self.cfg.get('default_scope')):
            composed = Compose(kept)

        def run(image: np.ndarray) -> dict[str, Any]:
            size = image.shape[:2]
            return composed(
                {
                    'img': image,
                    'img_shape': size,
                    'ori_shape': size,
                    'img_id': 0,
                    'img_path': '',
                    'seg_fields': [],
                }
            )

        return run

    def _classifiers(self) -> Any:
        from PIL import Image
        from timm.data import create_transform

        self._loader = None
        transform = create_transform(**dict(self._dataset().get('transform') or {}))

        def run(image: np.ndarray) -> dict[str, Any]:
            picture = Image.fromarray(np.ascontiguousarray(image[..., ::-1]))
            return {'inputs': transform(picture), 'labels': 0}

        return run

    def read(self, path: str | Path) -> np.ndarray:
        """An image file as the test pipeline loads it, `(H, W, 3)`.

        Raises:
            ValueError: It cannot be read.
        """
        return read_image(path, self._loader)

    def __call__(self, images: Sequence[np.ndarray]) -> list[Result]:
        """Results of images `(H, W, 3)` uint8, blue first.

        Images that the pipeline makes equally large are computed together, others one by one:
        padding to a common size would change what is found.
        """
        ready = [self.transform(image) for image in images]
        shapes = [tuple(sample['inputs'].shape) for sample in ready]
        results: list[Result | None] = [None] * len(ready)
        for shape in dict.fromkeys(shapes):
            rows = [i for i, other in enumerate(shapes) if other == shape]
            for i, result in zip(rows, self._run([ready[i] for i in rows]), strict=True):
                results[i] = result
        return [result for result in results if result is not None]

    def _run(self, samples: list[dict[str, Any]]) -> list[Result]:
        with torch.no_grad():
            if self.task == 'classification':
                batch = {
                    'inputs': torch.stack([sample['inputs'] for sample in samples]),
                    'labels': torch.zeros(len(samples), dtype=torch.long),
                }
                found = self.model.test_step(batch)
                return [{'probabilities': logits.softmax(0).cpu().numpy()} for logits, _ in found]
            with DefaultScope.overwrite_default_scope(self.cfg.get('default_scope')):
                outputs = self.model.test_step(pseudo_collate(samples))
        if self.task == 'segmentation':
            return [{'classes': o.pred_sem_seg.data[0].cpu().numpy()} for o in outputs]
        return [_detections(output.pred_instances) for output in outputs]


def _detections(found: Any) -> Result:
    boxes = getattr(found.bboxes, 'tensor', found.bboxes)
    order = torch.argsort(found.scores, descending=True, stable=True)
    result = {
        'boxes': boxes[order].cpu().numpy(),
        'scores': found.scores[order].cpu().numpy(),
        'labels': found.labels[order].cpu().numpy().astype(np.int64),
    }
    if 'masks' in found:
        masks = found.masks
        array = masks.cpu().numpy() if isinstance(masks, torch.Tensor) else masks.to_ndarray()
        result['masks'] = array.astype(bool)[order.cpu().numpy()]
    return result
