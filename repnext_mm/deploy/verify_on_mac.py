"""Compare the Core ML packages of a folder with its golden_*.npz; needs macOS and coremltools.

python verify_on_mac.py [FOLDER]
"""

import json
import sys
from pathlib import Path

import coremltools
import numpy as np

folder = Path(sys.argv[1] if len(sys.argv) > 1 else __file__).resolve()
passed = True
for path in sorted((folder if folder.is_dir() else folder.parent).glob('*.mlpackage')):
    model = coremltools.models.MLModel(str(path))
    meta = json.loads(model.user_defined_metadata['repnext_mm'])
    golden = dict(np.load(path.with_name(meta['golden'])))
    outputs = model.predict({'image': golden.pop('image')})
    for name, want in golden.items():
        error = outputs[name].astype(np.float64) - want
        relative = np.abs(error).max() / want.std()
        sqnr = 10 * np.log10((want**2).sum() / max((error**2).sum(), 1e-30))
        good = relative <= 1e-4 if meta['dtype'] == 'fp32' else sqnr >= 35
        passed = passed and good
        print(f'{"ok" if good else "FAILED"}: {path.name} {name} {relative:.1e}, {sqnr:.0f} dB')
sys.exit(0 if passed else 6)
