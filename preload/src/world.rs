// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which groups and devices there are, as the environment says.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use adapter_user::emulated::{
    DeviceGroup, Dma, Features, GroupFile, Irqs, MigrationVersion, Settings,
};
use adapter_user::{Errno, Group, GroupId, IommuSpec};
use vfio_engine::Engine;

use crate::container::Held;
use crate::control::{self, Driven};
use crate::remote::{Opening, Remote};
use crate::trace;

/// The container that a group is in.
type Place = Arc<Mutex<Weak<Held>>>;

struct World {
    groups: BTreeMap<u64, (Arc<DeviceGroup>, Place)>,
    /// The devices in other processes, by group and name.
    elsewhere: BTreeMap<(u64, String), Elsewhere>,
    /// Whether the program is to find the devices' own logs.
    own_log: bool,
}

/// A device in another process.
struct Elsewhere {
    socket: PathBuf,
    /// The device's file, while it is open.
    open: Mutex<Weak<Remote>>,
}

static OPENED: Mutex<Vec<Weak<dyn Driven>>> = Mutex::new(Vec::new());

/// Returns group `number`, if there is one. Without a valid environment there is none, and
/// standard error says why.
pub(crate) fn group(number: u64) -> Option<Arc<DeviceGroup>> {
    let (group, _) = world()?.groups.get(&number)?;
    Some(Arc::clone(group))
}

/// A group is about to join this container.
pub(crate) fn set_container(number: u64, held: &Arc<Held>) {
    let place = world().and_then(|world| world.groups.get(&number));
    if let Some((_, place)) = place {
        *place.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(held);
    }
}

/// Opens the device `name` of a group if it is in another process. A device that is open gets
/// another handle.
pub(crate) fn open_elsewhere(
    number: u64,
    name: &str,
    file: &Arc<GroupFile>,
) -> Option<Result<Arc<Remote>, Errno>> {
    let world = world()?;
    let elsewhere = world.elsewhere.get(&(number, name.to_owned()))?;
    let mut open = elsewhere
        .open
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    if let Some(remote) = open.upgrade() {
        return Some(Ok(remote));
    }
    let connect = || {
        let (_, place) = world.groups.get(&number).ok_or(Errno::ENODEV)?;
        let held = place.lock().unwrap_or_else(PoisonError::into_inner);
        let held = held.upgrade().ok_or(Errno::EINVAL)?;
        let remote = Arc::new(Remote::open(Opening {
            name,
            socket: &elsewhere.socket,
            container: &held.container,
            mappings: &held.mappings,
            group: GroupId(number),
            file: Arc::clone(file),
            shows_log: world.own_log,
        })?);
        held.attach(&remote)?;
        Ok(remote)
    };
    let remote = connect();
    if let Ok(remote) = &remote {
        *open = Arc::downgrade(remote);
    }
    Some(remote)
}

/// A device was opened: a test may drive it.
pub(crate) fn opened(device: Weak<dyn Driven>) {
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    opened.retain(|device| device.strong_count() != 0);
    opened.push(device);
    drop(opened);
    control::listen(open_devices);
}

fn open_devices() -> Vec<Arc<dyn Driven>> {
    let opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    opened.iter().filter_map(Weak::upgrade).collect()
}

fn world() -> Option<&'static World> {
    static WORLD: OnceLock<Option<World>> = OnceLock::new();
    let made = WORLD.get_or_init(|| {
        let made = make(|name| std::env::var(name).ok());
        made.map_err(|error| eprintln!("vfio-preload: {error}"))
            .ok()
    });
    made.as_ref()
}

/// Makes the groups and devices that the variables of the environment ask for.
fn make(variable: impl Fn(&str) -> Option<String>) -> Result<World, String> {
    let variable = |name: &str, default: &str| variable(name).unwrap_or_else(|| default.to_owned());
    let tracking = variable("VFIO_PRELOAD_TRACKING", "container");
    let own_log = match tracking.as_str() {
        "container" => false,
        "device" => true,
        _ => {
            return Err(format!(
                "VFIO_PRELOAD_TRACKING is {tracking:?}: say container or device"
            ))
        }
    };
    let version = variable("VFIO_PRELOAD_MIGRATION", "v2");
    let migration = migration(&version)?;
    let settings = Settings { migration, own_log };
    let kind = variable("VFIO_PRELOAD_GROUP", "emulated");
    let group: fn(GroupId) -> Group = match kind.as_str() {
        "emulated" => Group::emulated,
        "iommu" => |id| Group::iommu(id, IommuSpec::default()),
        _ => {
            return Err(format!(
                "VFIO_PRELOAD_GROUP is {kind:?}: say emulated or iommu"
            ))
        }
    };
    let mut groups: BTreeMap<u64, (DeviceGroup, Place)> = BTreeMap::new();
    let mut elsewhere = BTreeMap::new();
    let devices = variable("VFIO_PRELOAD_DEVICES", "42:dev0");
    for device in devices.split(',') {
        let (number, name, socket) = split(device).ok_or_else(|| {
            format!(
                "VFIO_PRELOAD_DEVICES has {device:?}: say GROUP:NAME, as 42:dev0, or \
                 GROUP:NAME=vfio-user:SOCKET"
            )
        })?;
        let (of_number, place) = groups.remove(&number).unwrap_or_else(|| {
            let place: Place = Arc::new(Mutex::new(Weak::new()));
            (DeviceGroup::new(group(GroupId(number))), place)
        });
        let of_number = match socket {
            None => of_number.with_device(name, settings, engine(&place)),
            Some(socket) => {
                let (socket, open) = (socket.into(), Mutex::new(Weak::new()));
                let device = Elsewhere { socket, open };
                elsewhere.insert((number, name.to_owned()), device);
                of_number
            }
        };
        groups.insert(number, (of_number, place));
    }
    let groups = groups.into_iter();
    let groups = groups.map(|(number, (group, place))| (number, (Arc::new(group), place)));
    Ok(World {
        groups: groups.collect(),
        elsewhere,
        own_log,
    })
}

/// Splits `GROUP:NAME` or `GROUP:NAME=vfio-user:SOCKET`.
fn split(device: &str) -> Option<(u64, &str, Option<&str>)> {
    let (number, name) = device.split_once(':')?;
    let (name, socket) = match name.split_once('=') {
        Some((name, socket)) => (name, Some(socket.strip_prefix("vfio-user:")?)),
        None => (name, None),
    };
    Some((number.parse().ok()?, name, socket))
}

/// What makes the sample device of a group.
fn engine(place: &Place) -> impl Fn(Dma, Irqs) -> Engine {
    let place = Arc::clone(place);
    move |dma, _| {
        let place = Arc::clone(&place);
        let write_unmarked = move |iova, data: &[u8]| {
            let held = place.lock().unwrap_or_else(PoisonError::into_inner);
            let held = held.upgrade().ok_or("the device is in no container")?;
            held.mappings.write_unmarked(iova, data)
        };
        Engine::new(dma, Box::new(write_unmarked), trace::line)
    }
}

/// `none`, `v1`, or `v2` with any of `+precopy` and `+p2p`.
fn migration(text: &str) -> Result<MigrationVersion, String> {
    let mut features = Features::default();
    let mut words = text.split('+');
    match words.next() {
        Some("none") if text == "none" => return Ok(MigrationVersion::None),
        Some("v1") if text == "v1" => return Ok(MigrationVersion::V1),
        Some("v2") => {}
        _ => return Err(bad_migration(text)),
    }
    for word in words {
        match word {
            "precopy" => features.pre_copy = true,
            "p2p" => features.p2p = true,
            _ => return Err(bad_migration(text)),
        }
    }
    Ok(MigrationVersion::V2(features))
}

fn bad_migration(text: &str) -> String {
    format!(
        "VFIO_PRELOAD_MIGRATION is {text:?}: say none, v1, v2, v2+precopy, v2+p2p or v2+precopy+p2p"
    )
}
