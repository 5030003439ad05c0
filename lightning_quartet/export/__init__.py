"""Export of trained models to formats that other libraries load, and the way back."""

from lightning_quartet.export.api import export_quartet
from lightning_quartet.export.formats import FORMATS, Format
from lightning_quartet.export.reading import from_pretrained_quartet

__all__ = ["FORMATS", "Format", "export_quartet", "from_pretrained_quartet"]
