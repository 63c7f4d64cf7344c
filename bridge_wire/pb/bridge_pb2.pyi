from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_BOOL: _ClassVar[DType]
    DTYPE_INT8: _ClassVar[DType]
    DTYPE_INT16: _ClassVar[DType]
    DTYPE_INT32: _ClassVar[DType]
    DTYPE_INT64: _ClassVar[DType]
    DTYPE_UINT8: _ClassVar[DType]
    DTYPE_UINT16: _ClassVar[DType]
    DTYPE_UINT32: _ClassVar[DType]
    DTYPE_UINT64: _ClassVar[DType]
    DTYPE_FLOAT16: _ClassVar[DType]
    DTYPE_BFLOAT16: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]
    DTYPE_FLOAT64: _ClassVar[DType]
    DTYPE_COMPLEX64: _ClassVar[DType]
    DTYPE_COMPLEX128: _ClassVar[DType]
    DTYPE_FLOAT8_E4M3FN: _ClassVar[DType]
    DTYPE_FLOAT8_E4M3FNUZ: _ClassVar[DType]
    DTYPE_FLOAT8_E5M2: _ClassVar[DType]
    DTYPE_FLOAT8_E5M2FNUZ: _ClassVar[DType]
    DTYPE_FLOAT8_E8M0FNU: _ClassVar[DType]

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODE_UNSPECIFIED: _ClassVar[Mode]
    MODE_TRAINING: _ClassVar[Mode]
    MODE_INFERENCE: _ClassVar[Mode]
DTYPE_UNSPECIFIED: DType
DTYPE_BOOL: DType
DTYPE_INT8: DType
DTYPE_INT16: DType
DTYPE_INT32: DType
DTYPE_INT64: DType
DTYPE_UINT8: DType
DTYPE_UINT16: DType
DTYPE_UINT32: DType
DTYPE_UINT64: DType
DTYPE_FLOAT16: DType
DTYPE_BFLOAT16: DType
DTYPE_FLOAT32: DType
DTYPE_FLOAT64: DType
DTYPE_COMPLEX64: DType
DTYPE_COMPLEX128: DType
DTYPE_FLOAT8_E4M3FN: DType
DTYPE_FLOAT8_E4M3FNUZ: DType
DTYPE_FLOAT8_E5M2: DType
DTYPE_FLOAT8_E5M2FNUZ: DType
DTYPE_FLOAT8_E8M0FNU: DType
MODE_UNSPECIFIED: Mode
MODE_TRAINING: Mode
MODE_INFERENCE: Mode

class Spec(_message.Message):
    __slots__ = ("dtype", "shape", "weak")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    WEAK_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    weak: bool
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., weak: bool = ...) -> None: ...

class Value(_message.Message):
    __slots__ = ("none", "boolean", "integer", "real", "text", "complex", "tuple")
    class Complex(_message.Message):
        __slots__ = ("real", "imag")
        REAL_FIELD_NUMBER: _ClassVar[int]
        IMAG_FIELD_NUMBER: _ClassVar[int]
        real: float
        imag: float
        def __init__(self, real: _Optional[float] = ..., imag: _Optional[float] = ...) -> None: ...
    class Tuple(_message.Message):
        __slots__ = ("items",)
        ITEMS_FIELD_NUMBER: _ClassVar[int]
        items: _containers.RepeatedCompositeFieldContainer[Value]
        def __init__(self, items: _Optional[_Iterable[_Union[Value, _Mapping]]] = ...) -> None: ...
    NONE_FIELD_NUMBER: _ClassVar[int]
    BOOLEAN_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    REAL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    COMPLEX_FIELD_NUMBER: _ClassVar[int]
    TUPLE_FIELD_NUMBER: _ClassVar[int]
    none: bool
    boolean: bool
    integer: int
    real: float
    text: str
    complex: Value.Complex
    tuple: Value.Tuple
    def __init__(self, none: bool = ..., boolean: bool = ..., integer: _Optional[int] = ..., real: _Optional[float] = ..., text: _Optional[str] = ..., complex: _Optional[_Union[Value.Complex, _Mapping]] = ..., tuple: _Optional[_Union[Value.Tuple, _Mapping]] = ...) -> None: ...

class Tree(_message.Message):
    __slots__ = ("leaf", "value", "tuple", "list", "dict", "namedtuple", "dataclass", "key")
    class Leaf(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    class Sequence(_message.Message):
        __slots__ = ("items",)
        ITEMS_FIELD_NUMBER: _ClassVar[int]
        items: _containers.RepeatedCompositeFieldContainer[Tree]
        def __init__(self, items: _Optional[_Iterable[_Union[Tree, _Mapping]]] = ...) -> None: ...
    class Mapping(_message.Message):
        __slots__ = ("keys", "items", "name", "origin", "returned")
        KEYS_FIELD_NUMBER: _ClassVar[int]
        ITEMS_FIELD_NUMBER: _ClassVar[int]
        NAME_FIELD_NUMBER: _ClassVar[int]
        ORIGIN_FIELD_NUMBER: _ClassVar[int]
        RETURNED_FIELD_NUMBER: _ClassVar[int]
        keys: _containers.RepeatedCompositeFieldContainer[Value]
        items: _containers.RepeatedCompositeFieldContainer[Tree]
        name: str
        origin: str
        returned: str
        def __init__(self, keys: _Optional[_Iterable[_Union[Value, _Mapping]]] = ..., items: _Optional[_Iterable[_Union[Tree, _Mapping]]] = ..., name: _Optional[str] = ..., origin: _Optional[str] = ..., returned: _Optional[str] = ...) -> None: ...
    class Record(_message.Message):
        __slots__ = ("name", "fields", "items", "origin", "returned", "statics")
        NAME_FIELD_NUMBER: _ClassVar[int]
        FIELDS_FIELD_NUMBER: _ClassVar[int]
        ITEMS_FIELD_NUMBER: _ClassVar[int]
        ORIGIN_FIELD_NUMBER: _ClassVar[int]
        RETURNED_FIELD_NUMBER: _ClassVar[int]
        STATICS_FIELD_NUMBER: _ClassVar[int]
        name: str
        fields: _containers.RepeatedScalarFieldContainer[str]
        items: _containers.RepeatedCompositeFieldContainer[Tree]
        origin: str
        returned: str
        statics: _containers.RepeatedCompositeFieldContainer[Tree.Static]
        def __init__(self, name: _Optional[str] = ..., fields: _Optional[_Iterable[str]] = ..., items: _Optional[_Iterable[_Union[Tree, _Mapping]]] = ..., origin: _Optional[str] = ..., returned: _Optional[str] = ..., statics: _Optional[_Iterable[_Union[Tree.Static, _Mapping]]] = ...) -> None: ...
    class Static(_message.Message):
        __slots__ = ("name", "value")
        NAME_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        name: str
        value: Value
        def __init__(self, name: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    class Key(_message.Message):
        __slots__ = ("implementation",)
        IMPLEMENTATION_FIELD_NUMBER: _ClassVar[int]
        implementation: str
        def __init__(self, implementation: _Optional[str] = ...) -> None: ...
    LEAF_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    TUPLE_FIELD_NUMBER: _ClassVar[int]
    LIST_FIELD_NUMBER: _ClassVar[int]
    DICT_FIELD_NUMBER: _ClassVar[int]
    NAMEDTUPLE_FIELD_NUMBER: _ClassVar[int]
    DATACLASS_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    leaf: Tree.Leaf
    value: Value
    tuple: Tree.Sequence
    list: Tree.Sequence
    dict: Tree.Mapping
    namedtuple: Tree.Record
    dataclass: Tree.Record
    key: Tree.Key
    def __init__(self, leaf: _Optional[_Union[Tree.Leaf, _Mapping]] = ..., value: _Optional[_Union[Value, _Mapping]] = ..., tuple: _Optional[_Union[Tree.Sequence, _Mapping]] = ..., list: _Optional[_Union[Tree.Sequence, _Mapping]] = ..., dict: _Optional[_Union[Tree.Mapping, _Mapping]] = ..., namedtuple: _Optional[_Union[Tree.Record, _Mapping]] = ..., dataclass: _Optional[_Union[Tree.Record, _Mapping]] = ..., key: _Optional[_Union[Tree.Key, _Mapping]] = ...) -> None: ...

class Recipe(_message.Message):
    __slots__ = ("origin", "fingerprint", "call", "record")
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    origin: str
    fingerprint: bytes
    call: bytes
    record: int
    def __init__(self, origin: _Optional[str] = ..., fingerprint: _Optional[bytes] = ..., call: _Optional[bytes] = ..., record: _Optional[int] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("kind", "message", "remote_type", "traceback", "retry_after_s", "request")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REMOTE_TYPE_FIELD_NUMBER: _ClassVar[int]
    TRACEBACK_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    kind: str
    message: str
    remote_type: str
    traceback: str
    retry_after_s: float
    request: str
    def __init__(self, kind: _Optional[str] = ..., message: _Optional[str] = ..., remote_type: _Optional[str] = ..., traceback: _Optional[str] = ..., retry_after_s: _Optional[float] = ..., request: _Optional[str] = ...) -> None: ...

class MeasureRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Statistics(_message.Message):
    __slots__ = ("uptime_s", "runs", "errors", "sessions", "lanes", "running", "waiting", "refused", "residuals", "residual_bytes", "evictions", "slab_bytes")
    class Runs(_message.Message):
        __slots__ = ("model", "derivative", "count", "compute_s", "copy_s", "output_bytes", "compiles", "compile_s", "queue_s", "times")
        MODEL_FIELD_NUMBER: _ClassVar[int]
        DERIVATIVE_FIELD_NUMBER: _ClassVar[int]
        COUNT_FIELD_NUMBER: _ClassVar[int]
        COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
        COPY_S_FIELD_NUMBER: _ClassVar[int]
        OUTPUT_BYTES_FIELD_NUMBER: _ClassVar[int]
        COMPILES_FIELD_NUMBER: _ClassVar[int]
        COMPILE_S_FIELD_NUMBER: _ClassVar[int]
        QUEUE_S_FIELD_NUMBER: _ClassVar[int]
        TIMES_FIELD_NUMBER: _ClassVar[int]
        model: str
        derivative: str
        count: int
        compute_s: float
        copy_s: float
        output_bytes: int
        compiles: int
        compile_s: float
        queue_s: float
        times: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, model: _Optional[str] = ..., derivative: _Optional[str] = ..., count: _Optional[int] = ..., compute_s: _Optional[float] = ..., copy_s: _Optional[float] = ..., output_bytes: _Optional[int] = ..., compiles: _Optional[int] = ..., compile_s: _Optional[float] = ..., queue_s: _Optional[float] = ..., times: _Optional[_Iterable[int]] = ...) -> None: ...
    class Errors(_message.Message):
        __slots__ = ("kind", "count")
        KIND_FIELD_NUMBER: _ClassVar[int]
        COUNT_FIELD_NUMBER: _ClassVar[int]
        kind: str
        count: int
        def __init__(self, kind: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    RESIDUALS_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    SLAB_BYTES_FIELD_NUMBER: _ClassVar[int]
    uptime_s: float
    runs: _containers.RepeatedCompositeFieldContainer[Statistics.Runs]
    errors: _containers.RepeatedCompositeFieldContainer[Statistics.Errors]
    sessions: int
    lanes: int
    running: int
    waiting: int
    refused: int
    residuals: int
    residual_bytes: int
    evictions: int
    slab_bytes: int
    def __init__(self, uptime_s: _Optional[float] = ..., runs: _Optional[_Iterable[_Union[Statistics.Runs, _Mapping]]] = ..., errors: _Optional[_Iterable[_Union[Statistics.Errors, _Mapping]]] = ..., sessions: _Optional[int] = ..., lanes: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., refused: _Optional[int] = ..., residuals: _Optional[int] = ..., residual_bytes: _Optional[int] = ..., evictions: _Optional[int] = ..., slab_bytes: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("version", "framework", "framework_version", "python_version", "x64", "devices", "models", "allocator", "cores", "namespaces", "gpu", "revision")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FRAMEWORK_FIELD_NUMBER: _ClassVar[int]
    FRAMEWORK_VERSION_FIELD_NUMBER: _ClassVar[int]
    PYTHON_VERSION_FIELD_NUMBER: _ClassVar[int]
    X64_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    ALLOCATOR_FIELD_NUMBER: _ClassVar[int]
    CORES_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    GPU_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    version: str
    framework: str
    framework_version: str
    python_version: str
    x64: bool
    devices: _containers.RepeatedScalarFieldContainer[str]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    allocator: str
    cores: int
    namespaces: _containers.RepeatedCompositeFieldContainer[Namespace]
    gpu: Gpu
    revision: str
    def __init__(self, version: _Optional[str] = ..., framework: _Optional[str] = ..., framework_version: _Optional[str] = ..., python_version: _Optional[str] = ..., x64: bool = ..., devices: _Optional[_Iterable[str]] = ..., models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., allocator: _Optional[str] = ..., cores: _Optional[int] = ..., namespaces: _Optional[_Iterable[_Union[Namespace, _Mapping]]] = ..., gpu: _Optional[_Union[Gpu, _Mapping]] = ..., revision: _Optional[str] = ...) -> None: ...

class Gpu(_message.Message):
    __slots__ = ("uuid", "name")
    UUID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    uuid: bytes
    name: str
    def __init__(self, uuid: _Optional[bytes] = ..., name: _Optional[str] = ...) -> None: ...

class Namespace(_message.Message):
    __slots__ = ("kind", "digest")
    KIND_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    kind: str
    digest: bytes
    def __init__(self, kind: _Optional[str] = ..., digest: _Optional[bytes] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "doc", "arguments", "parameters", "signatures", "modes", "methods")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DOC_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    MODES_FIELD_NUMBER: _ClassVar[int]
    METHODS_FIELD_NUMBER: _ClassVar[int]
    name: str
    doc: str
    arguments: _containers.RepeatedScalarFieldContainer[str]
    parameters: _containers.RepeatedCompositeFieldContainer[Parameter]
    signatures: _containers.RepeatedCompositeFieldContainer[Signature]
    modes: bool
    methods: _containers.RepeatedCompositeFieldContainer[Method]
    def __init__(self, name: _Optional[str] = ..., doc: _Optional[str] = ..., arguments: _Optional[_Iterable[str]] = ..., parameters: _Optional[_Iterable[_Union[Parameter, _Mapping]]] = ..., signatures: _Optional[_Iterable[_Union[Signature, _Mapping]]] = ..., modes: bool = ..., methods: _Optional[_Iterable[_Union[Method, _Mapping]]] = ...) -> None: ...

class Method(_message.Message):
    __slots__ = ("name", "arguments", "signature")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    name: str
    arguments: _containers.RepeatedScalarFieldContainer[str]
    signature: str
    def __init__(self, name: _Optional[str] = ..., arguments: _Optional[_Iterable[str]] = ..., signature: _Optional[str] = ...) -> None: ...

class Signature(_message.Message):
    __slots__ = ("inputs",)
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    inputs: _containers.RepeatedCompositeFieldContainer[Spec]
    def __init__(self, inputs: _Optional[_Iterable[_Union[Spec, _Mapping]]] = ...) -> None: ...

class Parameter(_message.Message):
    __slots__ = ("path", "spec", "trainable")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    TRAINABLE_FIELD_NUMBER: _ClassVar[int]
    path: str
    spec: Spec
    trainable: bool
    def __init__(self, path: _Optional[str] = ..., spec: _Optional[_Union[Spec, _Mapping]] = ..., trainable: bool = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("oldest_protocol", "newest_protocol", "client")
    OLDEST_PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    NEWEST_PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    oldest_protocol: int
    newest_protocol: int
    client: str
    def __init__(self, oldest_protocol: _Optional[int] = ..., newest_protocol: _Optional[int] = ..., client: _Optional[str] = ...) -> None: ...

class OpenReply(_message.Message):
    __slots__ = ("protocol", "session", "local_lane", "slab_bytes")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LOCAL_LANE_FIELD_NUMBER: _ClassVar[int]
    SLAB_BYTES_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    session: bytes
    local_lane: str
    slab_bytes: int
    def __init__(self, protocol: _Optional[int] = ..., session: _Optional[bytes] = ..., local_lane: _Optional[str] = ..., slab_bytes: _Optional[int] = ...) -> None: ...

class CloseRequest(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    def __init__(self, session: _Optional[bytes] = ...) -> None: ...

class CloseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PrepareRequest(_message.Message):
    __slots__ = ("session", "call", "parameters", "pullback", "shapes")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    PULLBACK_FIELD_NUMBER: _ClassVar[int]
    SHAPES_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    call: Call
    parameters: Parameters
    pullback: Pullback
    shapes: Shapes
    def __init__(self, session: _Optional[bytes] = ..., call: _Optional[_Union[Call, _Mapping]] = ..., parameters: _Optional[_Union[Parameters, _Mapping]] = ..., pullback: _Optional[_Union[Pullback, _Mapping]] = ..., shapes: _Optional[_Union[Shapes, _Mapping]] = ...) -> None: ...

class Call(_message.Message):
    __slots__ = ("model", "arguments", "inputs", "parameters", "transforms", "keep", "rngs", "mutable", "mode", "method", "recipes", "examples")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    TRANSFORMS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    RNGS_FIELD_NUMBER: _ClassVar[int]
    MUTABLE_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    RECIPES_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    model: str
    arguments: Tree
    inputs: _containers.RepeatedCompositeFieldContainer[Spec]
    parameters: bool
    transforms: _containers.RepeatedCompositeFieldContainer[Transform]
    keep: Wrt
    rngs: _containers.RepeatedScalarFieldContainer[str]
    mutable: bool
    mode: Mode
    method: str
    recipes: _containers.RepeatedCompositeFieldContainer[Recipe]
    examples: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, model: _Optional[str] = ..., arguments: _Optional[_Union[Tree, _Mapping]] = ..., inputs: _Optional[_Iterable[_Union[Spec, _Mapping]]] = ..., parameters: bool = ..., transforms: _Optional[_Iterable[_Union[Transform, _Mapping]]] = ..., keep: _Optional[_Union[Wrt, _Mapping]] = ..., rngs: _Optional[_Iterable[str]] = ..., mutable: bool = ..., mode: _Optional[_Union[Mode, str]] = ..., method: _Optional[str] = ..., recipes: _Optional[_Iterable[_Union[Recipe, _Mapping]]] = ..., examples: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Wrt(_message.Message):
    __slots__ = ("inputs",)
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    inputs: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, inputs: _Optional[_Iterable[int]] = ...) -> None: ...

class Transform(_message.Message):
    __slots__ = ("vjp", "jvp", "vmap")
    class Vjp(_message.Message):
        __slots__ = ("wrt", "outputs")
        WRT_FIELD_NUMBER: _ClassVar[int]
        OUTPUTS_FIELD_NUMBER: _ClassVar[int]
        wrt: _containers.RepeatedScalarFieldContainer[int]
        outputs: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, wrt: _Optional[_Iterable[int]] = ..., outputs: _Optional[_Iterable[int]] = ...) -> None: ...
    class Jvp(_message.Message):
        __slots__ = ("wrt", "outputs")
        WRT_FIELD_NUMBER: _ClassVar[int]
        OUTPUTS_FIELD_NUMBER: _ClassVar[int]
        wrt: _containers.RepeatedScalarFieldContainer[int]
        outputs: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, wrt: _Optional[_Iterable[int]] = ..., outputs: _Optional[_Iterable[int]] = ...) -> None: ...
    class Vmap(_message.Message):
        __slots__ = ("axes", "size")
        AXES_FIELD_NUMBER: _ClassVar[int]
        SIZE_FIELD_NUMBER: _ClassVar[int]
        axes: _containers.RepeatedScalarFieldContainer[int]
        size: int
        def __init__(self, axes: _Optional[_Iterable[int]] = ..., size: _Optional[int] = ...) -> None: ...
    VJP_FIELD_NUMBER: _ClassVar[int]
    JVP_FIELD_NUMBER: _ClassVar[int]
    VMAP_FIELD_NUMBER: _ClassVar[int]
    vjp: Transform.Vjp
    jvp: Transform.Jvp
    vmap: Transform.Vmap
    def __init__(self, vjp: _Optional[_Union[Transform.Vjp, _Mapping]] = ..., jvp: _Optional[_Union[Transform.Jvp, _Mapping]] = ..., vmap: _Optional[_Union[Transform.Vmap, _Mapping]] = ...) -> None: ...

class Parameters(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class Pullback(_message.Message):
    __slots__ = ("program", "wrt", "outputs")
    PROGRAM_FIELD_NUMBER: _ClassVar[int]
    WRT_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    program: int
    wrt: _containers.RepeatedScalarFieldContainer[int]
    outputs: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, program: _Optional[int] = ..., wrt: _Optional[_Iterable[int]] = ..., outputs: _Optional[_Iterable[int]] = ...) -> None: ...

class PrepareEvent(_message.Message):
    __slots__ = ("progress", "prepared", "error")
    class Progress(_message.Message):
        __slots__ = ("phase",)
        PHASE_FIELD_NUMBER: _ClassVar[int]
        phase: str
        def __init__(self, phase: _Optional[str] = ...) -> None: ...
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    progress: PrepareEvent.Progress
    prepared: Prepared
    error: Error
    def __init__(self, progress: _Optional[_Union[PrepareEvent.Progress, _Mapping]] = ..., prepared: _Optional[_Union[Prepared, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Shapes(_message.Message):
    __slots__ = ("call", "inputs")
    CALL_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    call: Call
    inputs: _containers.RepeatedCompositeFieldContainer[Shape]
    def __init__(self, call: _Optional[_Union[Call, _Mapping]] = ..., inputs: _Optional[_Iterable[_Union[Shape, _Mapping]]] = ...) -> None: ...

class Shape(_message.Message):
    __slots__ = ("sizes",)
    SIZES_FIELD_NUMBER: _ClassVar[int]
    sizes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, sizes: _Optional[_Iterable[str]] = ...) -> None: ...

class Prepared(_message.Message):
    __slots__ = ("program", "result", "outputs", "shapes", "fingerprint", "recipes")
    PROGRAM_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    SHAPES_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    RECIPES_FIELD_NUMBER: _ClassVar[int]
    program: int
    result: Tree
    outputs: _containers.RepeatedCompositeFieldContainer[Spec]
    shapes: _containers.RepeatedCompositeFieldContainer[Shape]
    fingerprint: bytes
    recipes: _containers.RepeatedCompositeFieldContainer[Recipe]
    def __init__(self, program: _Optional[int] = ..., result: _Optional[_Union[Tree, _Mapping]] = ..., outputs: _Optional[_Iterable[_Union[Spec, _Mapping]]] = ..., shapes: _Optional[_Iterable[_Union[Shape, _Mapping]]] = ..., fingerprint: _Optional[bytes] = ..., recipes: _Optional[_Iterable[_Union[Recipe, _Mapping]]] = ...) -> None: ...

class LaneRequest(_message.Message):
    __slots__ = ("attach", "share", "run", "release", "chunk", "peek", "order")
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    PEEK_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    attach: Attach
    share: Share
    run: Run
    release: Release
    chunk: bytes
    peek: Peek
    order: Order
    def __init__(self, attach: _Optional[_Union[Attach, _Mapping]] = ..., share: _Optional[_Union[Share, _Mapping]] = ..., run: _Optional[_Union[Run, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., chunk: _Optional[bytes] = ..., peek: _Optional[_Union[Peek, _Mapping]] = ..., order: _Optional[_Union[Order, _Mapping]] = ...) -> None: ...

class LaneReply(_message.Message):
    __slots__ = ("done", "ran", "usage", "error", "chunk", "peeked", "ordered")
    DONE_FIELD_NUMBER: _ClassVar[int]
    RAN_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    PEEKED_FIELD_NUMBER: _ClassVar[int]
    ORDERED_FIELD_NUMBER: _ClassVar[int]
    done: Done
    ran: Ran
    usage: Usage
    error: Error
    chunk: bytes
    peeked: bytes
    ordered: Ordered
    def __init__(self, done: _Optional[_Union[Done, _Mapping]] = ..., ran: _Optional[_Union[Ran, _Mapping]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., chunk: _Optional[bytes] = ..., peeked: _Optional[bytes] = ..., ordered: _Optional[_Union[Ordered, _Mapping]] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Attach(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    def __init__(self, session: _Optional[bytes] = ...) -> None: ...

class Share(_message.Message):
    __slots__ = ("base", "nbytes", "cuda_handle")
    BASE_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    CUDA_HANDLE_FIELD_NUMBER: _ClassVar[int]
    base: int
    nbytes: int
    cuda_handle: bytes
    def __init__(self, base: _Optional[int] = ..., nbytes: _Optional[int] = ..., cuda_handle: _Optional[bytes] = ...) -> None: ...

class Order(_message.Message):
    __slots__ = ("event", "words")
    EVENT_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    event: bytes
    words: int
    def __init__(self, event: _Optional[bytes] = ..., words: _Optional[int] = ...) -> None: ...

class Ordered(_message.Message):
    __slots__ = ("event", "by_words")
    EVENT_FIELD_NUMBER: _ClassVar[int]
    BY_WORDS_FIELD_NUMBER: _ClassVar[int]
    event: bytes
    by_words: bool
    def __init__(self, event: _Optional[bytes] = ..., by_words: bool = ...) -> None: ...

class Run(_message.Message):
    __slots__ = ("program", "inputs", "outputs", "inline", "residual", "released", "data", "turn", "timed")
    PROGRAM_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    TURN_FIELD_NUMBER: _ClassVar[int]
    TIMED_FIELD_NUMBER: _ClassVar[int]
    program: int
    inputs: _containers.RepeatedScalarFieldContainer[int]
    outputs: _containers.RepeatedScalarFieldContainer[int]
    inline: bool
    residual: int
    released: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    turn: int
    timed: bool
    def __init__(self, program: _Optional[int] = ..., inputs: _Optional[_Iterable[int]] = ..., outputs: _Optional[_Iterable[int]] = ..., inline: bool = ..., residual: _Optional[int] = ..., released: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ..., turn: _Optional[int] = ..., timed: bool = ...) -> None: ...

class Times(_message.Message):
    __slots__ = ("queue_s", "compute_s", "copy_s")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    COPY_S_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    compute_s: float
    copy_s: float
    def __init__(self, queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., copy_s: _Optional[float] = ...) -> None: ...

class Ran(_message.Message):
    __slots__ = ("data", "times")
    DATA_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    times: Times
    def __init__(self, data: _Optional[bytes] = ..., times: _Optional[_Union[Times, _Mapping]] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("residuals",)
    RESIDUALS_FIELD_NUMBER: _ClassVar[int]
    residuals: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, residuals: _Optional[_Iterable[int]] = ...) -> None: ...

class Peek(_message.Message):
    __slots__ = ("address", "nbytes")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    address: int
    nbytes: int
    def __init__(self, address: _Optional[int] = ..., nbytes: _Optional[int] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("residuals", "residual_bytes", "slab_bytes")
    RESIDUALS_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLAB_BYTES_FIELD_NUMBER: _ClassVar[int]
    residuals: int
    residual_bytes: int
    slab_bytes: int
    def __init__(self, residuals: _Optional[int] = ..., residual_bytes: _Optional[int] = ..., slab_bytes: _Optional[int] = ...) -> None: ...
