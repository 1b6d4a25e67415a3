"""The rooms' order: imports point one way, some never reach others, no modules import each other in a circle.

A room may import those below it, and those beside it unless that makes a circle.
"""

import grimp
import pytest

ORDER = [
    {"experiments", "qjax.experiments"},
    {"qjax.job", "qjax.bench", "qjax.testing"},
    {"qjax.function", "qjax.pipeline", "qjax.report"},
    {"qjax.allocate", "qjax.finetune", "qjax.interchange", "qjax.tensor_parallel"},
    {"qjax.matrix", "qjax.hessian"},
    {"qjax.rounding", "qjax.evaluate", "qjax.streams", "qjax.training"},
    {"qjax.codebooks", "qjax.formats", "qjax.incoherence", "qjax.data"},
    {"qjax.models"},
    {"qjax.linalg", "qjax.runtime", "qjax.configuration", "pallas_kernels"},
    {"qjax.errors", "qjax.registry", "qjax.typing"},
]
MATHEMATICS = ("qjax.linalg", "qjax.codebooks", "qjax.formats", "qjax.incoherence", "qjax.rounding", "qjax.matrix")
FACE = "qjax"  # hands names on
FLOORS = 12


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("qjax", "experiments", "pallas_kernels", include_external_packages=False)


def room(module):
    parts = module.split(".")
    return module if module == FACE else ".".join(parts[:2]) if parts[0] == FACE else parts[0]


def arrows(graph):
    """(importer, imported) of all modules, but for what the face hands on."""
    for importer in sorted(graph.modules):
        for imported in sorted(graph.find_modules_directly_imported_by(importer)):
            if FACE not in (importer, imported):
                yield importer, imported


def test_every_room_has_its_place_in_the_order(graph):
    assert {room(module) for module in graph.modules} - {FACE} == set().union(*ORDER)


def test_imports_point_down(graph):
    place = {name: floor for floor, rooms in enumerate(ORDER) for name in rooms}
    up = [pair for pair in arrows(graph) if place[room(pair[1])] < place[room(pair[0])]]
    assert not up


def test_the_mathematics_knows_no_models_no_text_and_no_machine_but_the_mesh(graph):
    forbidden = ("qjax.models", "qjax.data", "qjax.hessian", "qjax.runtime")
    found = [
        (importer, imported)
        for importer, imported in arrows(graph)
        if room(importer) in MATHEMATICS and room(imported) in forbidden and imported != "qjax.runtime.mesh"
    ]
    assert not found


def test_kernels_import_nothing_of_the_rest(graph):
    assert not [pair for pair in arrows(graph) if room(pair[0]) == "pallas_kernels" != room(pair[1])]


def test_no_rooms_and_no_modules_import_each_other_in_a_circle(graph):
    rooms: dict[str, set[str]] = {}
    modules: dict[str, set[str]] = {}
    for importer, imported in arrows(graph):
        modules.setdefault(importer, set()).add(imported)
        if room(importer) != room(imported):
            rooms.setdefault(room(importer), set()).add(room(imported))
    assert 0 < height(rooms) <= FLOORS
    assert height(
        {name: {other for other in found if not name.startswith(f"{other}.")} for name, found in modules.items()}
    )


def height(edges):
    """The longest way down, counted in stops. Raises AssertionError for a circle."""
    known: dict[str, int] = {}

    def of(name, above=()):
        assert name not in above, f"a circle: {' -> '.join([*above[above.index(name) :], name])}"
        if name not in known:
            known[name] = 1 + max((of(other, (*above, name)) for other in sorted(edges.get(name, ()))), default=0)
        return known[name]

    return max(map(of, sorted(edges)))


def test_a_circle_is_found():
    assert height({"a": {"b", "c"}, "b": {"c"}}) == 3
    with pytest.raises(AssertionError, match="a circle: b -> c -> b"):
        height({"a": {"b"}, "b": {"c"}, "c": {"b"}})


def test_no_module_lies_loose_and_no_file_is_longer_than_400_lines(pytestconfig):
    root = pytestconfig.rootpath
    assert {file.stem for file in (root / "qjax").glob("*.py")} == {"__init__", "errors", "typing"}
    folders = [root / name for name in ("qjax", "experiments", "pallas_kernels", "tests", "scripts", "notebooks")]
    files = [file for folder in folders for file in folder.rglob("*.py")]
    assert not [str(file.relative_to(root)) for file in files if len(file.read_text().splitlines()) > 400]
