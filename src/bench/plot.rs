//! The result as pictures, one below the other in one SVG file: latency distributions whose axis stretches the tail, the
//! depth sweep, the load curve. Text is left to whoever shows the file: no font is needed here.

use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::prelude::*;

use super::session::{CaseResult, Results, Series};
use super::stats::{LEAST_BEYOND, Latencies};

const WIDTH: u32 = 1100;
const HEIGHT: u32 = 520;
/// Points of a distribution for each decade of its tail.
const STEPS: u32 = 40;

/// One curve.
struct Curve {
    name: String,
    /// As they are drawn: an axis that is logarithmic holds logarithms.
    points: Vec<(f64, f64)>,
}

/// One picture.
struct Panel {
    title: &'static str,
    x: (&'static str, fn(f64) -> String),
    y: (&'static str, fn(f64) -> String),
    curves: Vec<Curve>,
}

/// The file's text: whatever there is to draw.
///
/// # Errors
/// When something cannot be drawn.
pub fn draw(results: &Results) -> anyhow::Result<String> {
    render(results).map_err(|error| anyhow!("cannot draw: {error}"))
}

fn render(results: &Results) -> Result<String, Box<dyn std::error::Error>> {
    let panels: Vec<Panel> = [
        Some(distributions(results)),
        sweep(results, "IOPS by queue depth", ("IOPS", count), |series| {
            series.total().iops()
        }),
        sweep(
            results,
            "p99 latency by queue depth",
            ("latency (usec)", power),
            |series| micros(series.total().all().at(99.0)),
        ),
        load_curve(results),
    ]
    .into_iter()
    .flatten()
    .filter(|panel| panel.curves.iter().any(|curve| !curve.points.is_empty()))
    .collect();
    let mut svg = String::new();
    {
        let rows = u32::try_from(panels.len().max(1))?;
        let root = SVGBackend::with_string(&mut svg, (WIDTH, HEIGHT * rows)).into_drawing_area();
        root.fill(&WHITE)?;
        for (area, panel) in root
            .split_evenly((panels.len().max(1), 1))
            .iter()
            .zip(&panels)
        {
            draw_panel(area, panel)?;
        }
        root.present()?;
    }
    Ok(svg)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn draw_panel(area: &Area<'_>, panel: &Panel) -> Result<(), Box<dyn std::error::Error>> {
    let (x, y) = (range(panel, |point| point.0), range(panel, |point| point.1));
    let mut chart = ChartBuilder::on(area)
        .caption(panel.title, ("sans-serif", 22))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(80)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc(panel.x.0)
        .y_desc(panel.y.0)
        .x_label_formatter(&|value| panel.x.1(*value))
        .y_label_formatter(&|value| panel.y.1(*value))
        .label_style(("sans-serif", 14))
        .draw()?;
    for (index, curve) in panel.curves.iter().enumerate() {
        let color = Palette99::pick(index).to_rgba();
        chart
            .draw_series(LineSeries::new(curve.points.clone(), color.stroke_width(2)))?
            .label(&curve.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        if curve.points.len() < 2 * usize::try_from(STEPS)? {
            let dots = curve
                .points
                .iter()
                .map(|at| Circle::new(*at, 3, color.filled()));
            chart.draw_series(dots)?;
        }
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 14))
        .draw()?;
    Ok(())
}

/// With some room around, and never empty.
fn range(panel: &Panel, of: fn(&(f64, f64)) -> f64) -> std::ops::Range<f64> {
    let values = panel.curves.iter().flat_map(|curve| &curve.points).map(of);
    let (low, high) = values.fold((f64::MAX, f64::MIN), |(low, high), value| {
        (low.min(value), high.max(value))
    });
    let room = ((high - low) * 0.06).max(0.05);
    (low - room)..(high + room)
}

fn name(case: &CaseResult, series: &Series) -> String {
    format!("{} {}", series.label, case.case.job.name)
}

fn distributions(results: &Results) -> Panel {
    let mut curves = Vec::new();
    let plain = results
        .cases
        .iter()
        .filter(|case| case.case.share.is_none());
    for case in plain {
        for series in &case.series {
            curves.push(Curve {
                name: format!("{} iodepth {}", name(case, series), case.case.depth),
                points: distribution(&series.total().all()),
            });
        }
    }
    Panel {
        title: "Latency distribution",
        x: ("percentile", nines),
        y: ("latency (usec)", power),
        curves,
    }
}

/// To where [`LEAST_BEYOND`] samples are left.
fn distribution(latencies: &Latencies) -> Vec<(f64, f64)> {
    let decades = (latencies.count() as f64 / LEAST_BEYOND as f64).log10();
    if decades < 0.1 {
        return Vec::new();
    }
    let steps = super::stats::whole(decades * f64::from(STEPS));
    (0..=steps)
        .map(|step| {
            let nines = step as f64 / f64::from(STEPS);
            let percent = 100.0 * (1.0 - 10f64.powf(-nines));
            (nines, micros(latencies.at(percent)))
        })
        .collect()
}

/// Every target's figure at each depth; nothing unless there are several.
fn sweep(
    results: &Results,
    title: &'static str,
    y: (&'static str, fn(f64) -> String),
    value: fn(&Series) -> f64,
) -> Option<Panel> {
    let plain: Vec<&CaseResult> = results
        .cases
        .iter()
        .filter(|case| case.case.share.is_none())
        .collect();
    let several = |case: &&&CaseResult| case.case.job.depths.len() > 1;
    let curves = gather(plain.iter().filter(several).copied(), |case, series| {
        Some((f64::from(case.case.depth).log2(), value(series)))
    });
    (!curves.is_empty()).then_some(Panel {
        title,
        x: ("queue depth", |value| {
            if (value - value.round()).abs() < 0.01 {
                format!("{:.0}", value.exp2())
            } else {
                String::new()
            }
        }),
        y,
        curves,
    })
}

fn load_curve(results: &Results) -> Option<Panel> {
    let loaded: Vec<&CaseResult> = results
        .cases
        .iter()
        .filter(|case| case.case.share.is_some())
        .collect();
    let mut curves = Vec::new();
    for percent in [50.0, 99.0] {
        let mut of = gather(loaded.iter().copied(), |case, series| {
            let rate = series.rate? * f64::from(case.case.job.numjobs);
            Some((rate, micros(series.total().all().at(percent))))
        });
        of.iter_mut()
            .for_each(|curve| curve.name += &format!(" p{percent}"));
        curves.extend(of);
    }
    (!curves.is_empty()).then_some(Panel {
        title: "Latency under load (open loop)",
        x: ("arrivals a second", count),
        y: ("latency (usec)", power),
        curves,
    })
}

/// One curve for each target and job, in the order of cases.
fn gather<'a>(
    cases: impl Iterator<Item = &'a CaseResult>,
    point: impl Fn(&CaseResult, &Series) -> Option<(f64, f64)>,
) -> Vec<Curve> {
    let mut curves: Vec<Curve> = Vec::new();
    for case in cases {
        for series in &case.series {
            let name = name(case, series);
            let Some(point) = point(case, series) else {
                continue;
            };
            match curves.iter_mut().find(|curve| curve.name == name) {
                Some(curve) => curve.points.push(point),
                None => curves.push(Curve {
                    name,
                    points: vec![point],
                }),
            }
        }
    }
    curves
}

/// Nanoseconds as the logarithm of microseconds.
fn micros(nanos: u64) -> f64 {
    (nanos.max(1) as f64 / 1000.0).log10()
}

/// What a logarithm stands for.
fn power(value: f64) -> String {
    let value = 10f64.powf(value);
    if value < 10.0 {
        format!("{value:.2}")
    } else {
        format!("{value:.0}")
    }
}

fn count(value: f64) -> String {
    match value {
        ..1e4 => format!("{value:.0}"),
        1e4..1e6 => format!("{:.0}k", value / 1e3),
        _ => format!("{:.2}M", value / 1e6),
    }
}

/// `90%`, `99%`, `99.9%`, ...: an axis on which each nine takes the same room.
fn nines(value: f64) -> String {
    if (value - value.round()).abs() > 0.01 || value < -0.01 {
        return String::new();
    }
    let percent = 100.0 * (1.0 - 10f64.powf(-value));
    // As many digits as it has nines.
    let digits = (value.round() - 2.0).max(0.0);
    format!(
        "{percent:.*}%",
        usize::try_from(super::stats::whole(digits)).unwrap_or(0)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_axis_names_a_nine_at_each_whole_step() {
        let names: Vec<String> = [0.0, 1.0, 1.5, 2.0, 3.0, 5.0].map(nines).to_vec();
        assert_eq!(names, ["0%", "90%", "", "99%", "99.9%", "99.999%"]);
    }

    #[test]
    fn distribution_ends_where_ten_samples_are_left() {
        let mut latencies = Latencies::default();
        for nanos in 1..=100_000u64 {
            latencies.record(nanos * 1000);
        }
        let points = distribution(&latencies);
        let last = points.last().unwrap();
        assert!((last.0 - 4.0).abs() < 0.03, "{last:?}");
        assert!((last.1 - 5.0).abs() < 0.01, "{last:?}");
        assert!(distribution(&Latencies::default()).is_empty());
    }
}
