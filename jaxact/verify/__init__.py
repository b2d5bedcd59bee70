"""A checker of derivative rules that can say no: `rule`, `values`, `contract` and `residuals`, each of which returns a
`Report` with one of three verdicts.
"""

from jaxact.verify._contract import contract
from jaxact.verify._report import NotVerified, Report
from jaxact.verify._residuals import residuals
from jaxact.verify._rule import rule
from jaxact.verify._values import values

__all__ = ["NotVerified", "Report", "contract", "residuals", "rule", "values"]
