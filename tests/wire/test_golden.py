"""Golden bytes: each message kind of the contract, exactly as it goes over the wire.

A number, a type or a name that changes by accident fails here. A change on purpose is a new
protocol version, or adds a field, which goes into a message below together with its bytes.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.message import Message

from bridge_wire.lane import frames
from bridge_wire.pb import bridge_pb2 as pb

T = pb.Tree
V = pb.Value
LEAF = T(leaf=T.Leaf())
POINT = T.Record(name="P", fields=["x"], items=[LEAF])
SPEC = pb.Spec(dtype=pb.DTYPE_FLOAT32, shape=[2, 300])
RECIPE = pb.Recipe(origin="m.P#0", fingerprint=b"12345678", call=b"c", record=2)
ERROR = pb.Error(
    kind="SpecError",
    message="m",
    remote_type="t",
    traceback="b",
    retry_after_s=0.5,
    request="r",
)

MESSAGES: dict[str, Message] = {
    "spec": SPEC,
    "spec of a number": pb.Spec(dtype=pb.DTYPE_COMPLEX128, weak=True),
    "none": V(none=True),
    "boolean": V(boolean=False),
    "integer": V(integer=-3),
    "real": V(real=1.5),
    "text": V(text="é"),
    "complex": V(complex=V.Complex(real=1.0, imag=-2.0)),
    "a key of two": V(tuple=V.Tuple(items=[V(integer=1), V(text="a")])),
    "leaf": LEAF,
    "value": T(value=V(text="v")),
    "tuple": T(tuple=T.Sequence(items=[LEAF, LEAF])),
    "list": T(list=T.Sequence(items=[LEAF])),
    "dict": T(
        dict=T.Mapping(
            keys=[V(text="k"), V(integer=1)], items=[LEAF, T(tuple=T.Sequence())]
        )
    ),
    "namedtuple": T(namedtuple=POINT),
    "dataclass": T(dataclass=POINT),
    "the sender's class": T(dataclass=T.Record(name="P", origin="m.P")),
    "the receiver's class": T(dataclass=T.Record(name="P", returned="m.P")),
    "a receiver's class with static parts": T(
        dataclass=T.Record(
            name="P", returned="m.P", statics=[T.Static(name="n", value=V(integer=5))]
        )
    ),
    "the sender's mapping": T(dict=T.Mapping(name="M", origin="m.M")),
    "the receiver's mapping": T(dict=T.Mapping(name="M", returned="m.M")),
    "random keys": T(key=T.Key(implementation="threefry2x32")),
    "error": ERROR,
    "measure": pb.MeasureRequest(),
    "measured": pb.Statistics(
        uptime_s=1.5,
        runs=[
            pb.Statistics.Runs(
                model="f",
                derivative="forward",
                count=3,
                compute_s=0.5,
                copy_s=0.25,
                output_bytes=48,
                compiles=1,
                compile_s=2.0,
                queue_s=0.125,
                times=[0, 2, 1],
            )
        ],
        errors=[pb.Statistics.Errors(kind="RemoteModelError", count=1)],
        sessions=1,
        lanes=2,
        running=1,
        waiting=3,
        refused=4,
        residuals=2,
        residual_bytes=64,
        evictions=5,
        slab_bytes=4096,
    ),
    "describe": pb.DescribeRequest(),
    "described": pb.DescribeReply(
        version="0.1.0",
        framework="jax",
        framework_version="0.10",
        python_version="3.11",
        x64=True,
        devices=["cpu:0"],
        models=[
            pb.Model(
                name="f",
                doc="d",
                arguments=["x", "y"],
                parameters=[pb.Parameter(path="params.w", spec=SPEC, trainable=True)],
                signatures=[pb.Signature(inputs=[SPEC])],
                modes=True,
                methods=[
                    pb.Method(name="encode", arguments=["x"], signature="(x, n=1)")
                ],
            )
        ],
        allocator="a",
        cores=2,
        namespaces=[pb.Namespace(kind="pid", digest=b"d")],
        gpu=pb.Gpu(uuid=b"u", name="g"),
        revision="r1",
    ),
    "open": pb.OpenRequest(oldest_protocol=1, newest_protocol=2, client="c"),
    "opened": pb.OpenReply(
        protocol=1, session=b"\x00\xff", local_lane="/l", slab_bytes=1 << 30
    ),
    "close": pb.CloseRequest(session=b"s"),
    "closed": pb.CloseReply(),
    "prepare call": pb.PrepareRequest(
        session=b"s",
        call=pb.Call(
            model="f",
            arguments=LEAF,
            inputs=[SPEC],
            parameters=True,
            transforms=[
                pb.Transform(vjp=pb.Transform.Vjp(wrt=[0, 1], outputs=[2])),
                pb.Transform(jvp=pb.Transform.Jvp(wrt=[3], outputs=[4])),
                pb.Transform(vmap=pb.Transform.Vmap(axes=[-1, 0, 2], size=5)),
            ],
            keep=pb.Wrt(inputs=[0, 7]),
            rngs=["dropout"],
            mutable=True,
            mode=pb.MODE_INFERENCE,
            method="encode",
        ),
    ),
    "prepare call with recipes": pb.PrepareRequest(
        call=pb.Call(model="f", recipes=[RECIPE])
    ),
    "prepare call with examples": pb.PrepareRequest(
        call=pb.Call(model="f", examples=[b"\1\2", b""])
    ),
    "prepare parameters": pb.PrepareRequest(
        session=b"s", parameters=pb.Parameters(model="f")
    ),
    "prepare pullback": pb.PrepareRequest(
        session=b"s", pullback=pb.Pullback(program=9, wrt=[1], outputs=[0, 2])
    ),
    "ask for shapes": pb.PrepareRequest(
        session=b"s",
        shapes=pb.Shapes(call=pb.Call(model="f"), inputs=[pb.Shape(sizes=["d0", "3"])]),
    ),
    "progress": pb.PrepareEvent(progress=pb.PrepareEvent.Progress(phase="compiling")),
    "not prepared": pb.PrepareEvent(error=pb.Error(kind="CallerError", message="no")),
    "prepared": pb.PrepareEvent(
        prepared=pb.Prepared(program=3, result=LEAF, outputs=[SPEC])
    ),
    "prepared with a fingerprint": pb.PrepareEvent(
        prepared=pb.Prepared(program=3, fingerprint=b"12345678")
    ),
    "prepared with recipes": pb.PrepareEvent(
        prepared=pb.Prepared(program=3, recipes=[RECIPE])
    ),
    "shapes": pb.PrepareEvent(prepared=pb.Prepared(shapes=[pb.Shape(sizes=["2*d0"])])),
    "attach": pb.LaneRequest(attach=pb.Attach(session=b"s")),
    "share": pb.LaneRequest(share=pb.Share(base=4096, nbytes=1 << 24)),
    "run": pb.LaneRequest(
        run=pb.Run(
            program=1,
            inputs=[4096, 1 << 40],
            outputs=[8192],
            residual=7,
            released=[5, 6],
        )
    ),
    "inline run": pb.LaneRequest(run=pb.Run(program=1, inline=True, data=b"\x04")),
    "release": pb.LaneRequest(release=pb.Release(residuals=[1, 300])),
    "share on a GPU": pb.LaneRequest(
        share=pb.Share(base=1 << 56, nbytes=2 << 20, cuda_handle=b"h")
    ),
    "peek": pb.LaneRequest(peek=pb.Peek(address=4096, nbytes=256)),
    "order": pb.LaneRequest(order=pb.Order(event=b"e")),
    "order by words": pb.LaneRequest(order=pb.Order(words=1 << 56)),
    "run in order by words": pb.LaneRequest(run=pb.Run(program=1, turn=2)),
    "run timed": pb.LaneRequest(run=pb.Run(program=1, timed=True)),
    "chunk up": pb.LaneRequest(chunk=b"\x01\x02"),
    "done": pb.LaneReply(done=pb.Done()),
    "ran": pb.LaneReply(ran=pb.Ran()),
    "ran inline": pb.LaneReply(ran=pb.Ran(data=b"\x05")),
    "ran timed": pb.LaneReply(
        ran=pb.Ran(times=pb.Times(queue_s=0.5, compute_s=1, copy_s=0.25))
    ),
    "usage": pb.LaneReply(usage=pb.Usage(residuals=1, residual_bytes=2, slab_bytes=3)),
    "peeked": pb.LaneReply(peeked=b"\x04"),
    "ordered": pb.LaneReply(ordered=pb.Ordered(event=b"e")),
    "ordered by words": pb.LaneReply(ordered=pb.Ordered(by_words=True)),
    "failed": pb.LaneReply(error=ERROR),
    "chunk down": pb.LaneReply(chunk=b"\x03"),
}

GOLDEN = {
    "spec": "080c120302ac02",
    "spec of a number": "080f1801",
    "none": "0801",
    "boolean": "1000",
    "integer": "1805",
    "real": "21000000000000f83f",
    "text": "2a02c3a9",
    "complex": "321209000000000000f03f1100000000000000c0",
    "a key of two": "3a090a0218020a032a0161",
    "leaf": "0a00",
    "value": "12032a0176",
    "tuple": "1a080a020a000a020a00",
    "list": "22040a020a00",
    "dict": "2a110a032a016b0a02180212020a0012021a00",
    "namedtuple": "320a0a01501201781a020a00",
    "dataclass": "3a0a0a01501201781a020a00",
    "the sender's class": "3a080a015022036d2e50",
    "the receiver's class": "3a080a01502a036d2e50",
    "a receiver's class with static parts": "3a110a01502a036d2e5032070a016e1202180a",
    "the sender's mapping": "2a081a014d22036d2e4d",
    "the receiver's mapping": "2a081a014d2a036d2e4d",
    "random keys": "420e0a0c746872656566727932783332",
    "error": "0a09537065634572726f7212016d1a017422016229000000000000e03f320172",
    "measure": "",
    "measured": (
        "09000000000000f83f123b0a01661207666f7277617264180321000000000000e03f29000000000000d03f30"
        "30380141000000000000004049000000000000c03f52030002011a140a1052656d6f74654d6f64656c457272"
        "6f72100120012802300138034804500258406005688020"
    ),
    "describe": "",
    "described": (
        "0a05302e312e3012036a61781a04302e31302204332e3131280132056370753a303a470a01661201641a0178"
        "1a017922150a08706172616d732e771207080c120302ac0218012a090a07080c120302ac0230013a150a0665"
        "6e636f64651201781a0828782c206e3d3129420161480252080a037069641201645a060a0175120167620272"
        "31"
    ),
    "open": "080110021a0163",
    "opened": "0801120200ff1a022f6c208080808004",
    "close": "0a0173",
    "closed": "",
    "prepare call": (
        "0a0173124d0a016612020a001a07080c120302ac0220012a090a070a0200011201022a0812060a0103120104"
        "2a091a070a03010004100532040a0200073a0764726f706f7574400148025206656e636f6465"
    ),
    "prepare call with recipes": "121b0a01665a160a056d2e502330120831323334353637381a01632002",
    "prepare call with examples": "120b0a0166a201020102a20100",
    "prepare parameters": "0a01731a030a0166",
    "prepare pullback": "0a0173220908091201011a020002",
    "ask for shapes": "0a01732a0e0a030a016612070a0264300a0133",
    "progress": "0a0b0a09636f6d70696c696e67",
    "not prepared": "1a110a0b43616c6c65724572726f7212026e6f",
    "prepared": "120f080312020a001a07080c120302ac02",
    "prepared with a fingerprint": "120c08032a083132333435363738",
    "prepared with recipes": "121a080332160a056d2e502330120831323334353637381a01632002",
    "shapes": "120822060a04322a6430",
    "attach": "0a030a0173",
    "share": "12080880201080808008",
    "run": "1a160801120880208080808080201a028040280732020506",
    "inline run": "1a07080120013a0104",
    "release": "22050a0301ac02",
    "share on a GPU": "12120880808080808080800110808080011a0168",
    "peek": "3206088020108002",
    "order": "3a030a0165",
    "order by words": "3a0a10808080808080808001",
    "run in order by words": "1a0408014002",
    "run timed": "1a0408014801",
    "chunk up": "2a020102",
    "done": "0a00",
    "ran": "1200",
    "ran inline": "12030a0105",
    "ran timed": "121d121b09000000000000e03f11000000000000f03f19000000000000d03f",
    "usage": "1a06080110021803",
    "peeked": "320104",
    "ordered": "3a030a0165",
    "ordered by words": "3a021001",
    "failed": "22200a09537065634572726f7212016d1a017422016229000000000000e03f320172",
    "chunk down": "2a0103",
}

DTYPES = {
    "UNSPECIFIED": 0,
    "BOOL": 1,
    "INT8": 2,
    "INT16": 3,
    "INT32": 4,
    "INT64": 5,
    "UINT8": 6,
    "UINT16": 7,
    "UINT32": 8,
    "UINT64": 9,
    "FLOAT16": 10,
    "BFLOAT16": 11,
    "FLOAT32": 12,
    "FLOAT64": 13,
    "COMPLEX64": 14,
    "COMPLEX128": 15,
    "FLOAT8_E4M3FN": 16,
    "FLOAT8_E4M3FNUZ": 17,
    "FLOAT8_E5M2": 18,
    "FLOAT8_E5M2FNUZ": 19,
    "FLOAT8_E8M0FNU": 20,
}

# Method: (request, reply, whether the requests and the replies are a stream).
METHODS = {
    "Describe": ("DescribeRequest", "DescribeReply", False, False),
    "Open": ("OpenRequest", "OpenReply", False, False),
    "Prepare": ("PrepareRequest", "PrepareEvent", False, True),
    "Lane": ("LaneRequest", "LaneReply", True, True),
    "Close": ("CloseRequest", "CloseReply", False, False),
    "Measure": ("MeasureRequest", "Statistics", False, False),
}


def fields_of(descriptor: Any) -> Iterator[str]:
    """Yield the full names of a message type, its fields, and those of the types nested in it."""
    yield descriptor.full_name
    for field in descriptor.fields:
        yield field.full_name
    for nested in descriptor.nested_types:
        yield from fields_of(nested)


def fields_used(message: Message) -> Iterator[str]:
    """Yield the full names of a message's type, of its fields that are set, and of those of the
    messages in it."""
    yield message.DESCRIPTOR.full_name
    for field, value in message.ListFields():
        yield field.full_name
        if field.message_type is not None:
            for item in [value] if isinstance(value, Message) else value:
                yield from fields_used(item)


@pytest.mark.parametrize("name", MESSAGES)
def test_message_has_its_golden_bytes(name: str) -> None:
    """A message is serialized to the golden bytes, and those bytes are parsed to that message."""
    message, golden = MESSAGES[name], bytes.fromhex(GOLDEN[name])
    assert message.SerializeToString(deterministic=True).hex() == golden.hex()
    assert type(message).FromString(golden) == message


def test_every_field_of_the_contract_has_golden_bytes() -> None:
    """Each message type and each field of the contract is set in one of the golden messages."""
    declared = {
        name
        for kind in pb.DESCRIPTOR.message_types_by_name.values()
        for name in fields_of(kind)
    }
    used = {name for message in MESSAGES.values() for name in fields_used(message)}
    assert declared == used
    assert set(MESSAGES) == set(GOLDEN)


def test_dtypes_have_their_golden_numbers() -> None:
    """The numbers of the dtypes are those that every released client and worker knows."""
    assert dict(pb.DType.items()) == {
        f"DTYPE_{name}": number for name, number in DTYPES.items()
    }


def test_service_has_its_golden_methods() -> None:
    """The service's full name, its methods, their messages and which of them stream are those of
    version 1."""
    service = pb.DESCRIPTOR.services_by_name["Bridge"]
    assert service.full_name == "bridge.v1.Bridge"
    assert {
        method.name: (
            method.input_type.name,
            method.output_type.name,
            method.client_streaming,
            method.server_streaming,
        )
        for method in service.methods
    } == METHODS


def test_frame_of_a_request_has_its_golden_bytes() -> None:
    """On a framed lane a message goes as its length in four bytes, least significant first, and
    its bytes."""
    assert (
        frames.encode(bytes.fromhex(GOLDEN["attach"])).hex()
        == "05000000" + GOLDEN["attach"]
    )
