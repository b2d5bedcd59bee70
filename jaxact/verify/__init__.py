"""A checker of derivative rules that can say no: `rule`, `values`, `contract` and `residuals`, each of which returns a
`Report` with one of three verdicts.
"""

from jaxact.verify._contract import contract as contract
from jaxact.verify._report import NotVerified as NotVerified, Report as Report
from jaxact.verify._residuals import residuals as residuals
from jaxact.verify._rule import rule as rule
from jaxact.verify._values import values as values
