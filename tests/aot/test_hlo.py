"""Reading modules as XLA prints them, and how often their loops go round."""

from jexit.aot.hlo import Trips, parse

LOOP = """HloModule m, is_scheduled=true

%cond (c: (s32[], bf16[4,8], s32[])) -> pred[] {{
  %c = (s32[], bf16[4,8]{{1,0:T(8,128)(2,1)}}, /*index=2*/s32[]) parameter(0)
  %limit = s32[]{{:T(128)}} constant({limit})
  %at = s32[]{{:T(128)}} get-tuple-element(%c), index=0
  %given = s32[]{{:T(128)}} get-tuple-element(%c), index=2
  ROOT %lt = pred[]{{:T(512)}} {compare}, metadata={{op_name="jit(f)/while/cond/lt"}}
}}

%body (b: (s32[], bf16[4,8], s32[])) -> (s32[], bf16[4,8], s32[]) {{
  %b = (s32[], bf16[4,8]{{1,0:T(8,128)(2,1)}}, /*index=2*/s32[]) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%b), index=0
  %h = bf16[4,8]{{1,0:T(8,128)(2,1)}} get-tuple-element(%b), index=1
  %n = s32[]{{:T(128)}} get-tuple-element(%b), index=2
  %step = s32[]{{:T(128)}} constant({step})
  %next = s32[]{{:T(128)}} add(%i, %step)
  ROOT %out = (s32[], bf16[4,8]{{1,0:T(8,128)(2,1)}}, s32[]) tuple(%next, %h, %n)
}}

ENTRY %main (x: bf16[4,8], first: s32[]) -> bf16[4,8] {{
  %x = bf16[4,8]{{1,0:T(8,128)(2,1)S(1)}} parameter(0)
  %first = s32[] parameter(1)
  %zero = s32[]{{:T(128)}} constant({start})
  %start = s32[]{{:T(128)}} copy(%zero)
  %nine = s32[]{{:T(128)}} constant(9)
  %carried = (s32[], bf16[4,8]{{1,0:T(8,128)(2,1)}}, s32[]) tuple({carried}, %x, %nine)
  %loop = (s32[], bf16[4,8]{{1,0}}, s32[]) while(%carried), condition=%cond, body=%body
  ROOT %y = bf16[4,8]{{1,0:T(8,128)(2,1)}} get-tuple-element(%loop), index=1
}}
"""


def module_of(**changes):
    usual = {
        "limit": 7,
        "step": 1,
        "start": 0,
        "carried": "%start",
        "compare": "compare(%at, %limit), direction=LT",
    }
    return parse(LOOP.format(**usual | changes))


def test_trips_follow_from_start_step_and_limit():
    for changes, expected in (
        ({}, Trips(7, "exact")),
        ({"start": 3}, Trips(4, "exact")),
        ({"step": 2}, Trips(4, "exact")),
        ({"start": 8}, Trips(0, "exact")),
        ({"compare": "compare(%at, %given), direction=LT"}, Trips(9, "exact")),
        ({"compare": "compare(%at, %limit), direction=GT"}, Trips(1, "unknown")),
        ({"carried": "%first"}, Trips(1, "unknown")),
        ({"step": -1}, Trips(1, "unknown")),
    ):
        module = module_of(**changes)
        main = module.computations["main"]
        assert module.trips(main["loop"], main) == expected, changes


def test_shapes_layouts_and_tuples():
    module = module_of()
    assert module.entry == "main" and set(module.computations) == {"cond", "body", "main"}
    main = module.computations["main"]
    assert [str(array) for array in main["loop"].arrays] == ["s32[]", "bf16[4,8]", "s32[]"]
    (x,) = main["x"].arrays
    assert (x.bytes, x.in_hbm) == (64, False)  # S(1) is memory on the chip
    assert main["carried"].operands == ("start", "x", "nine")
    assert main["y"].is_root and main["loop"].called == ("body",)
    assert module.computations["cond"]["lt"].op_name == "jit(f)/while/cond/lt"
