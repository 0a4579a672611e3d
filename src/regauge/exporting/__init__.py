"""Write a model as ONNX or as a ``torch.export`` archive, and certify what was written against the source."""

from regauge.exporting.evidence import ExportCertificate, OutputEvidence, Probe
from regauge.exporting.program import FORMATS, Dynamic
from regauge.exporting.run import ExportResult, export

__all__ = ["FORMATS", "Dynamic", "ExportCertificate", "ExportResult", "OutputEvidence", "Probe", "export"]
