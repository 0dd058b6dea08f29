//! Prints what a controller and its namespaces say of themselves.
//! `cargo run -p nvme-driver --example identify`: needs no hardware, the controller is the software model.

use std::error::Error;

use nvme_driver::Controller;
use nvme_driver::spec::ascii_field;
use nvme_model::{Model, ModelConfig};

fn main() -> Result<(), Box<dyn Error>> {
    let transport = Model::new(ModelConfig {
        size: 64 << 20,
        namespaces: 2,
        ..ModelConfig::default()
    })?;
    let mut controller = Controller::new(transport)?
        .enable(4)
        .map_err(|(_, error)| error)?;
    let identity = controller.identity();
    println!("model      {}", ascii_field(&identity.mn));
    println!("serial     {}", ascii_field(&identity.sn));
    println!("firmware   {}", ascii_field(&identity.fr));
    println!("version    {}", controller.version());
    println!("transfer   {} bytes per command", controller.max_transfer());
    println!(
        "queues     {} I/O queue pairs granted",
        controller.granted_queue_pairs()
    );
    for nsid in controller.active_namespaces()? {
        let namespace = controller.namespace(nsid)?;
        println!(
            "namespace  {}: {} blocks of {} bytes",
            nsid.0, namespace.blocks, namespace.block_size
        );
    }
    controller.shutdown().map_err(|(_, error)| error)?;
    Ok(())
}
