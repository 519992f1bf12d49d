from .pipeline_far import FARPipeline
from .pipeline_output import FARPipelineOutput
from .session import FARSession
